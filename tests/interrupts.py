"""Interrupts that fall where Python lets a signal in: after calls, at jumps back, at a function's door."""

import contextlib
import dis
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
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

    def pass_by(self, code: CodeType, last: int, now: int) -> None:
        """From one instruction of a code to the next."""
        opened, handlers = places(code)
        # a signal is handled where the call stood, here it is raised one place later
        if last in opened and handlers.get(last) == handlers.get(now):
            self.passed += 1
            if self.passed == self.at:
                raise KeyboardInterrupt


@cache
def places(code: CodeType) -> tuple[set[int], dict[int, int]]:
    """Instructions of a code at which a signal is handled; and those under a handler -> it."""
    listed = list(dis.get_instructions(code))
    opened = {each.offset for each in listed if each.opname in OPENINGS}
    covered = dis._parse_exception_table(code)  # pyright: ignore[reportAttributeAccessIssue]
    handlers = {
        each.offset: entry.target
        for each in listed
        for entry in reversed(covered)
        if entry.start <= each.offset < entry.end
    }
    return opened, handlers


@contextlib.contextmanager
def traced(signal: Signal) -> Iterator[None]:
    """Python 3.11 tells a thread's own function of each instruction."""

    def called(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(ROOM):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        last = -1

        def step(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal last
            if event == "opcode":
                before, last = last, frame.f_lasti
                signal.pass_by(frame.f_code, before, last)
            return step

        return step

    outer = sys.gettrace()
    sys.settrace(called)
    try:
        yield
    finally:
        sys.settrace(outer)


@contextlib.contextmanager
def monitored(signal: Signal) -> Iterator[None]:
    """Later ones tell it of a code only from its second run on, but let all codes be watched before."""
    monitoring: Any = sys.monitoring  # pyright: ignore[reportAttributeAccessIssue]
    tool, told = monitoring.PROFILER_ID, monitoring.events.INSTRUCTION
    mine, last = threading.get_ident(), dict[int, tuple[CodeType, int]]()

    def step(code: CodeType, place: int) -> None:
        if threading.get_ident() == mine:
            frame = id(sys._getframe(1))  # held, it would hold what nobody else does
            (whose, before), last[frame] = last.get(frame, (code, -1)), (code, place)
            signal.pass_by(code, before if whose is code else -1, place)

    codes = all_codes()
    monitoring.use_tool_id(tool, "interrupts")
    try:
        monitoring.register_callback(tool, told, step)
        for code in codes:
            monitoring.set_local_events(tool, code, told)
        yield
    finally:
        for code in codes:
            monitoring.set_local_events(tool, code, 0)
        monitoring.register_callback(tool, told, None)
        monitoring.free_tool_id(tool)


def all_codes() -> set[CodeType]:
    """Of the functions and methods in the library's modules, and of functions inside them."""
    modules = [each for name, each in sys.modules.items() if name.partition(".")[0] == "testtime"]
    left: list[Any] = [value for module in modules for value in vars(module).values()]
    found: set[Any] = set()
    while left:
        each = left.pop()
        if isinstance(each, type) and each.__module__.startswith("testtime"):
            left += vars(each).values()
        left += [getattr(each, name, None) for name in ("__wrapped__", "__func__", "fget", "func")]
        code = each if isinstance(each, CodeType) else getattr(each, "__code__", None)
        if isinstance(code, CodeType) and code.co_filename.startswith(ROOM) and code not in found:
            found.add(code)
            left += code.co_consts
    return found


def interrupted(run: Callable[[], Any], at: int = 0) -> int:
    """Runs with an interrupt at the `at`-th place; gives how many places were passed."""
    signal = Signal(at)
    watched = traced if sys.version_info < (3, 12) else monitored
    with contextlib.suppress(KeyboardInterrupt), watched(signal):
        run()
    return signal.passed
