"""An estimator in files: it comes back as it was, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.learner.estimator import MetaLearner
from fastmeta.tasks import Sinusoid


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(1, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 1))


def fitted(**settings: Any) -> MetaLearner:
    settings = {"model": network(), "loss": F.mse_loss, "inner_lr": 0.05, "verbose": False} | settings
    settings["options"] = {"engine": "autodiff"}  # spares small tests the time of tracing
    return MetaLearner(**settings).fit(Sinusoid(2, 4), steps_per_epoch=2)


def output(learner: MetaLearner) -> Tensor:
    support, query = Sinusoid(1, 4, seed=5).sample().task(0)
    return learner.predict(query[0], support)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[MetaLearner, Path]:
    folder = tmp_path_factory.mktemp("saved")
    learner = fitted(algorithm=fm.MetaSGD, optimizer=torch.optim.SGD, inner_steps=2, eval_steps=3)
    learner.save(folder)
    return learner, folder


def test_it_comes_back(saved: tuple[MetaLearner, Path]) -> None:
    learner, folder = saved
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".safetensors"]
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    again = MetaLearner.load(folder, model)
    assert torch.equal(output(again), output(learner))
    assert again.history_ == learner.history_
    assert again.n_steps_ == 2
    parameters = again.get_params()
    assert parameters.pop("model") is model
    named = {"algorithm": "MetaSGD", "loss": "mse_loss", "optimizer": "SGD"}
    assert parameters == {n: v for n, v in learner.get_params().items() if n != "model"} | named
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(output(MetaLearner.load(folder, model, eval_steps=1)), output(learner.set_params(eval_steps=1)))
    learner.set_params(eval_steps=3)
    again.set_params(warm_start=True).fit(Sinusoid(2, 4), steps_per_epoch=1)
    assert not torch.equal(output(again), output(learner))


def test_what_is_no_plain_value_is_given_again(tmp_path: Path) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().mean()

    rate = nn.Parameter(torch.tensor(0.05))
    learner = fitted(loss=loss, inner_lr=rate)
    learner.save(tmp_path)
    assert rate.item() == pytest.approx(0.05)  # the learned one is the copy's
    with pytest.raises(
        ValueError, match=r"\['inner_lr', 'loss'\] must be given, .*load\(path, model, inner_lr=\.\.\.\)"
    ):
        MetaLearner.load(tmp_path, network())
    again = MetaLearner.load(tmp_path, network(), loss=loss, inner_lr=rate)
    assert torch.equal(output(again), output(learner))
    assert again.learner_.lr.item() == learner.learner_.lr.item() != pytest.approx(0.05, abs=1e-6)
    with pytest.raises(TypeError, match=r"parameters must be of .*, got \['speed'\]"):
        MetaLearner.load(tmp_path, network(), loss=loss, inner_lr=rate, speed=1)
    instance = fm.MAML(network(), F.mse_loss, lr=0.05, engine="autodiff")
    MetaLearner(algorithm=instance, verbose=False).fit(Sinusoid(2, 4), steps_per_epoch=1).save(tmp_path / "instance")
    with pytest.raises(ValueError, match=r"\['algorithm'\] must be given"):
        MetaLearner.load(tmp_path / "instance")
    assert output(MetaLearner.load(tmp_path / "instance", algorithm=instance)).shape == (4, 1)


def test_saving_replaces_in_one_step(saved: tuple[MetaLearner, Path], tmp_path: Path, monkeypatch: Any) -> None:
    learner, _ = saved
    learner.save(tmp_path)
    truth = output(learner)
    other = fitted(algorithm=fm.MetaSGD, inner_steps=2, eval_steps=3, random_state=3)
    real = Path.replace

    def broken(self: Path, target: Any) -> Path:
        if str(target).endswith(".json"):
            raise OSError(28, "No space left on device")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", broken)
        with pytest.raises(OSError, match=r"cannot write .*learner\.json"):
            other.save(tmp_path)
    assert torch.equal(output(MetaLearner.load(tmp_path, network())), truth)
    other.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(output(MetaLearner.load(tmp_path, network())), output(other))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write into folder"):
        learner.save(tmp_path / "file" / "x")


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        record = json.loads((folder / "learner.json").read_text())
        change(record)
        (folder / "learner.json").write_text(json.dumps(record))

    return damage


def tensors(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = next(folder.glob("*.safetensors"))
        file.write_bytes(change(file.read_bytes()))

    return damage


def cut(share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / "learner.json").read_bytes()
        (folder / "learner.json").write_bytes(content[: int(share * len(content))])

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (cut(0), "must be JSON"),
    "half": (cut(0.5), "must be JSON"),
    "no text": (lambda f: (f / "learner.json").write_bytes(b"\xff\xfe\x00"), "must be JSON"),
    "nested too deep": (lambda f: (f / "learner.json").write_text("[" * 200_000), "must be JSON"),
    "a list": (lambda f: (f / "learner.json").write_text("[]"), "must hold"),
    "no state": (edit(lambda r: r.pop("state")), "must hold"),
    "another version": (edit(lambda r: r.update(version=2)), "must be of version 1, got 2"),
    "another kind": (edit(lambda r: r["state"].update(kind="fit")), "must hold an estimator"),
    "no parameters": (edit(lambda r: r["state"].pop("parameters")), "must hold an estimator, got KeyError"),
    "parameters": (edit(lambda r: r["state"].update(parameters=3)), "must hold an estimator"),
    "a parameter": (edit(lambda r: r["state"]["parameters"].update(options={"x": 1})), "must hold an estimator"),
    "an unknown parameter": (edit(lambda r: r["state"]["parameters"].update(speed=1)), "of this version"),
    "history": (edit(lambda r: r["state"].update(history=3)), "must hold an estimator"),
    "tensors cut": (tensors(lambda b: b[:-9]), "damaged or truncated"),
    "a bit": (tensors(lambda b: b[:-1] + bytes([b[-1] ^ 1])), "damaged or truncated"),
    "no tensors": (lambda f: next(f.glob("*.safetensors")).unlink(), "which is missing"),
    "tensors elsewhere": (edit(lambda r: r.update(tensors="../x")), "must name a file beside it"),
    "tensors are the folder": (edit(lambda r: r.update(tensors="..")), "must name a file beside it"),
    "tensors without a name": (edit(lambda r: r.update(tensors="")), "must name a file beside it"),
    "tensors are a number": (edit(lambda r: r.update(tensors=3)), "must name a file beside it"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(saved: tuple[MetaLearner, Path], tmp_path: Path, damage: str) -> None:
    for file in saved[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    harm, message = DAMAGES[damage]
    harm(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        MetaLearner.load(tmp_path, network())
    assert "learner" in str(refusal.value)


def test_another_model_or_folder_is_refused(saved: tuple[MetaLearner, Path], tmp_path: Path) -> None:
    _, folder = saved
    for model, message in [
        (network(5), r"learner\.json must fit the model, got: .* is torch.float32 \[4, 1\] and not"),
        (network().double(), "torch.float32"),
        (nn.Linear(1, 1), "is unknown"),
    ]:
        with pytest.raises(ValueError, match=message):
            MetaLearner.load(folder, model)
    with pytest.raises(ValueError, match="missing"):
        MetaLearner.load(folder, network(), algorithm="mamlplusplus")
    with pytest.raises(FileNotFoundError, match=r"there is no .*learner\.json"):
        MetaLearner.load(tmp_path, network())
