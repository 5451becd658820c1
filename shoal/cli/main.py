"""``shoal``: finds the command, runs it, and turns whatever goes wrong into one sentence and an exit code.

0    done, also after one Ctrl-C, which stops a run cleanly
1    the job failed, or shoal itself did
2    the request makes no sense
130  interrupted before there was anything to stop cleanly, or a second time
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import typer

from shoal.cli import commands
from shoal.cli.answer import Answer, standard_output, write
from shoal.errors import RequestError, ShoalError, UserCodeError, did_you_mean

INTERRUPTED = 130
_LAST_WORD_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``shoal`` with the given arguments (by default the process's own) and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    options = given[: given.index("--")] if "--" in given else given
    json = "--json" in options
    with standard_output(json) as stream:
        try:
            with _sigterm_is_interrupt():
                answer = _run(given)
                if answer is not None and not _follows():
                    write(answer, stream, json)
                if answer is not None and answer.then is not None:
                    answer.then()
            return 0
        except BaseException as error:
            code, sentence = _explain(error)
            if json and not _follows():
                write(Answer({"error": sentence, "exit_code": code}), stream, json)
            return code


def run() -> NoReturn:
    """The console command: ``main``, and the end of the process."""
    code = main()
    group = sys.modules.get("shoal.comm.group")
    if group is not None and group.has_threads():
        # They may ask for the interpreter while it ends, which aborts the process. So it ends as far as anybody can see, and then
        # at once.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def build() -> Any:
    """Return the parser of the whole command line."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, help=commands.HELP)
    app.callback()(commands.root)
    for command in commands.COMMANDS:
        decorate = app.command(
            command.name,
            cls=command.parser,
            help=command.help if command.built else f"{command.help} (not built yet)",
            short_help=command.short_help,
            context_settings={} if command.built else {"allow_extra_args": True, "ignore_unknown_options": True},
        )
        decorate(_deferred(command.function))
    return typer.main.get_command(app)


def _run(arguments: list[str]) -> Answer | None:
    parser = build()
    try:
        call = parser.main(args=arguments, prog_name="shoal", standalone_mode=False)
    except Exception as error:
        # typer has its own copy of click, or uses click, by its version: told by what it can do, not by its class.
        if hasattr(error, "format_message"):
            raise RequestError(_usage_sentence(error, arguments, parser)) from None
        raise
    # A number instead of a command is the exit code of --help and --version, which have printed all.
    answer = call() if callable(call) else None
    assert answer is None or isinstance(answer, Answer)
    return answer


def _deferred(function: Callable[..., Answer]) -> Callable[..., Callable[[], Answer]]:
    """Let the parser only parse: it would turn some exceptions of the command into its own."""

    @functools.wraps(function)
    def parsed(*args: Any, **kwargs: Any) -> Callable[[], Answer]:
        return functools.partial(function, *args, **kwargs)

    return parsed


def _usage_sentence(error: Any, arguments: Sequence[str], parser: Any) -> str:
    """One plain sentence for what the parser did not like."""
    word = next((argument for argument in arguments if not argument.startswith("-")), "")
    command = parser.commands.get(word)
    path = f"shoal {word}" if command else "shoal"
    message = " ".join(str(error.format_message()).split()).rstrip(".")
    option = str(getattr(error, "option_name", None) or "")
    if "No such command" in message:
        near = did_you_mean(word, parser.commands)
        return f'There is no command "{word}".{near} The commands are {", ".join(parser.commands)}.'
    if option and "No such option" in message:
        own = [name for parameter in (command or parser).params for name in parameter.opts if name.startswith("-")]
        return f"{path} has no option {option}.{did_you_mean(option, own)} See {path} --help."
    if option and "requires an argument" in message:
        return f"{option} needs a value. See {path} --help."
    names = list(getattr(getattr(error, "param", None), "opts", ()))
    value = _value_of(names, arguments)
    if value is not None and "integer" in message:
        return f"{names[0]} is {value}; give a whole number."
    return f"{message}. See {path} --help."


def _value_of(names: Sequence[str], arguments: Sequence[str]) -> str | None:
    """The text that was given for an option: the parser's own message leaves it out."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names and equals:
            return value
        if name in names and index + 1 < len(arguments):
            return arguments[index + 1]
    return None


def _follows() -> bool:
    """Whether this is one of several processes of a job, and not the one that speaks for all."""
    from shoal.comm.member import Member

    try:
        member = Member.of(os.environ)
    except RequestError:
        return False
    return member is not None and member.rank > 0


def _explain(error: BaseException) -> tuple[int, str]:
    """Print what is to be said about an error, the sentence last; return the exit code and the sentence."""
    # A request that makes no sense makes none in any process; of other failures rank 0 has been told.
    if _follows() and (isinstance(error, RequestError) or getattr(error, "told_by_rank_0", False)):
        # Whoever watches over the job ends everybody as soon as the first has left: let rank 0 say it before.
        time.sleep(_LAST_WORD_S)
        return getattr(error, "exit_code", INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1), str(error)
    if isinstance(error, KeyboardInterrupt):
        code, sentence = INTERRUPTED, "Interrupted."
    elif isinstance(error, ShoalError):
        code, sentence = error.exit_code, " ".join(str(error).split())
        if isinstance(error, UserCodeError) and error.traceback_text:
            where = "" if error.rank is None else f", in worker {error.rank}"
            _complain(f"your code raised{where}:\n{error.traceback_text.rstrip()}")
    elif isinstance(error, SystemExit):
        # shoal never exits from within: this is a script that does more than define a job when it is read.
        code = 1
        sentence = f"The job's code called sys.exit({error.code!r}); put that behind an if __name__ guard."
    else:
        code, sentence = 1, _bug_sentence(error)
    _complain(sentence)
    return code, sentence


def _bug_sentence(error: BaseException) -> str:
    kind = type(error).__name__
    what = " ".join(f"{kind}: {error}".split())
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="shoal-traceback-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
    except OSError:
        _complain(text)
        return f"This is a bug in shoal ({what}); please report it with the traceback above."
    return f"This is a bug in shoal ({what}); please report it with the traceback in {file.name}."


def _complain(text: str) -> None:
    # A terminal that has gone away must not hide the exit code.
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _sigterm_is_interrupt() -> Iterator[None]:
    """SIGTERM is Ctrl-C, as the contract says; signals can only be set in the main thread."""
    if threading.current_thread() is not threading.main_thread() or os.name == "nt":
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
