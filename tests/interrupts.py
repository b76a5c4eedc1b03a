"""Interrupts that fall where Python lets a signal in: after calls, at jumps back, at a function's door."""

import contextlib
import dis
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import testtime

OPENINGS = {"CALL", "CALL_KW", "CALL_FUNCTION_EX", "RESUME", "JUMP_BACKWARD"}
ROOM = str(Path(testtime.__file__).parent)


class Signal:
    """Counts such places in the library's own code, and raises a `KeyboardInterrupt` at one of them."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.passed = at, 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(ROOM):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._within(frame.f_code)

    def _within(self, code: CodeType) -> Callable[..., Any]:
        names = {each.offset: each.opname for each in dis.get_instructions(code)}
        covered = dis._parse_exception_table(code)  # pyright: ignore[reportAttributeAccessIssue]
        before = -1

        def handler(place: int) -> Any:
            return next((each.target for each in covered if each.start <= place < each.end), None)

        def step(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal before
            if event == "opcode":
                last, before = before, frame.f_lasti
                # a signal is handled where the call stood, here it is raised one place later
                if names.get(last) in OPENINGS and handler(last) == handler(before):
                    self.passed += 1
                    if self.passed == self.at:
                        raise KeyboardInterrupt
            return step

        return step


def interrupted(run: Callable[[], Any], at: int = 0) -> int:
    """Runs with an interrupt at the `at`-th place; gives how many places were passed."""
    signal, outer = Signal(at), sys.gettrace()
    sys.settrace(signal)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            run()
    finally:
        sys.settrace(outer)
    return signal.passed
