"""Runs the compiled extension without torch, on meta-steps that were recorded, so that instructions can be counted.

``python -I -S driver.py EXTENSION FOLDER NAME TIMES`` runs the case ``FOLDER/NAME.json`` so many times; tensors are
bytes in ``FOLDER/NAME.bin``. Importing torch would take longer than all else under valgrind.
"""

import ctypes
import importlib.machinery
import importlib.util
import json
import pathlib
import sys
import types


class Memory:
    """Bytes, as much of a tensor as the extension asks for."""

    def __init__(self, content):
        self.content = bytearray(content)
        size = len(self.content)
        self.held = (ctypes.c_char * size).from_buffer(self.content) if size else None

    def data_ptr(self):
        return ctypes.addressof(self.held) if self.held is not None else 0

    def is_contiguous(self):
        return True

    def contiguous(self):
        return self


def stand_in():
    """Modules with the names that the extension looks up in torch."""
    torch, nn = types.ModuleType("torch"), types.ModuleType("torch.nn")
    torch.Tensor, nn.Parameter, torch.nn = Memory, Memory, nn
    torch.empty_like = lambda memory: Memory(len(memory.content))
    sys.modules["torch"], sys.modules["torch.nn"] = torch, nn


def main(extension, folder, name, times):
    stand_in()
    loader = importlib.machinery.ExtensionFileLoader("_C", extension)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
    loader.exec_module(module)
    case = json.loads(pathlib.Path(folder, f"{name}.json").read_text())
    blob = pathlib.Path(folder, f"{name}.bin").read_bytes()

    def filled(value):
        if isinstance(value, dict):
            begin, end = value["bytes"]
            return Memory(blob[begin:end])
        return [filled(each) for each in value] if isinstance(value, list) else value

    step = module.MetaGradient32(*case["programs"])
    call = step.call(*case["call"])
    arguments = [filled(value) for value in case["run"]]
    for _ in range(int(times)):
        call.run(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
