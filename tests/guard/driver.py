"""Runs the compiled extension without torch, on meta-steps that were recorded, so that instructions can be counted.

``python -I -S driver.py EXTENSION CASE TIMES`` runs the case of ``cases.py`` in this file so many times. Under valgrind
starting and importing take longer than all else, so it imports what is compiled into Python.
"""

import marshal
import sys
from _frozen_importlib import ModuleSpec, module_from_spec
from _frozen_importlib_external import ExtensionFileLoader
from array import array


class Memory:
    """Bytes, as much of a tensor as the extension asks for."""

    def __init__(self, content):
        self.content = array("B", content)

    def data_ptr(self):
        return self.content.buffer_info()[0] if self.content else 0

    def is_contiguous(self):
        return True

    def contiguous(self):
        return self


class Torch(type(sys)):
    """The names that the extension looks up in torch and torch.nn."""

    Tensor = Parameter = Memory

    @staticmethod
    def empty_like(memory):
        return Memory(bytes(len(memory.content)))


def filled(value):
    """Arguments with memory for bytes."""
    if isinstance(value, bytes):
        return Memory(value)
    return [filled(each) for each in value] if isinstance(value, (list, tuple)) else value


def main(extension, case, times):
    sys.modules["torch"], sys.modules["torch.nn"] = Torch("torch"), Torch("torch.nn")
    loader = ExtensionFileLoader("_C", extension)
    module = module_from_spec(ModuleSpec("_C", loader, origin=extension))
    loader.exec_module(module)
    with open(case, "rb") as file:  # noqa: PTH123
        programs, call, arguments = marshal.load(file)
    step = module.MetaGradient32(*programs)
    run = step.call(*call).run
    arguments = filled(arguments)
    for _ in range(int(times)):
        run(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
