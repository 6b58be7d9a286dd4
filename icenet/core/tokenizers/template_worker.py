"""Renders chat templates. This program runs in a process of its own, with limits of time and memory.

A template is code from a file that somebody else wrote. The sandbox of jinja2 keeps it from Python's internals. It
does not keep it from using all the time and memory: a comparison of nested lists can take years in one call. So the
process ends after `CPU_SECONDS` of one template or above `MAX_BYTES` of memory, and `chat.py` starts another one.

Reads one JSON object per line, `{"template", "values"}`, and writes one: `{"text"}`, or `{"error", "kind"}`. It
imports the standard library and jinja2 only.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, NoReturn

CPU_SECONDS = 0.5
MAX_BYTES = 512 << 20
MAX_CHARACTERS = 1 << 24
"""Maximum length of a rendered text, and of a text or list that an operator makes."""
_MAX_WIDTH = 1 << 20
"""Largest number that a method of a text, or one of these filters, takes."""
_SIZED_FILTERS = ("batch", "center", "indent", "slice", "tojson", "truncate", "wordwrap")
_MAX_BITS = 1 << 12
_OLDEST = (3, 1, 6)
"""Older versions of jinja2 have known ways out of the sandbox."""


def main() -> None:
    """Answers requests until the standard input ends."""
    sys.path += sys.argv[1:]  # where the caller found jinja2
    render = _renderer()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # both are inherited from the caller
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    _limit_memory()
    # the answer has a file descriptor of its own, so that nothing else is written to it
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(json.dumps({"text": "ready"}), file=out, flush=True)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # the default action of its signal ends the process
        answer = json.dumps(render(request["template"], request["values"], request.get("options", [])))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, file=out, flush=True)


def _limit_memory() -> None:
    import resource

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def watch() -> None:
        while peak() < most:
            time.sleep(0.01)
        os._exit(1)

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    most = peak() + MAX_BYTES  # macOS has no limit; on Linux the peak at the start is that of the caller
    threading.Thread(target=watch, daemon=True).start()


def _renderer() -> Callable[[str, dict[str, Any], list[str]], dict[str, Any]]:
    """Returns a function that renders a template, with what `transformers` offers to a chat template."""
    import jinja2
    import jinja2.meta
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

    environment = _environment()
    compiled = functools.lru_cache(maxsize=16)(environment.from_string)

    def render(template: str, values: dict[str, Any], options: list[str]) -> dict[str, Any]:
        if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < _OLDEST:
            return {"kind": "version", "error": jinja2.__version__}
        try:
            text = compiled(template).render(**values)
            if len(text) > MAX_CHARACTERS:
                return {"kind": "limit", "error": f"its text has more than {MAX_CHARACTERS:,} characters"}
            read = jinja2.meta.find_undeclared_variables(environment.parse(template)) if options else set()
            return {"text": text, "unused": [name for name in options if name not in read]}
        except _Refused as error:
            return {"kind": "refused", "error": str(error)}
        except TemplateSyntaxError as error:
            return {"kind": "syntax", "error": f"{error.message} (line {error.lineno})"}
        except SecurityError as error:
            return {"kind": "fault", "error": f"it uses what a template must not: {error}"}
        except MemoryError:
            return {"kind": "limit", "error": f"it needs more than {MAX_BYTES >> 20} MB"}
        except RecursionError:
            return {"kind": "fault", "error": "it is nested too deeply"}
        except (TemplateError, Exception) as error:
            return {"kind": "fault", "error": str(error) or type(error).__name__}

    return render


class _Refused(Exception):
    """A template has called raise_exception."""


def _environment() -> Any:
    from jinja2.ext import loopcontrols

    environment = _sandbox_class()(trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.filters |= {name: _limited(environment.filters[name]) for name in _SIZED_FILTERS}
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _namespace_class(),
    }
    return environment


# the classes are made in functions, because this file can be imported without jinja2


def _generation_tag() -> type[Any]:
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}` marks what the model has written; it renders its content."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Any) -> str:
            return str(caller())

    return Generation


def _namespace_class() -> type[Any]:
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class SafeNamespace(Namespace):
        """The namespace of jinja2, without names that begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, given = args[0], dict(*args[1:], **kwargs)
            for name in given:
                check_name(name)
            Namespace.__init__(self, given)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            super().__setitem__(name, value)

    def check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"the name {name!r} in a namespace")

    return SafeNamespace


def _sandbox_class() -> type[Any]:
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        """The sandbox, with limits of what one operation makes."""

        intercepted_binops = frozenset({"+", "*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _bits(operator, left, right) > _MAX_BITS:
                raise SecurityError(f"a number of more than {_MAX_BITS:,} bits")
            if _items(operator, left, right) > MAX_CHARACTERS:
                raise SecurityError(f"a text or list of more than {MAX_CHARACTERS:,} items")
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            if isinstance(getattr(function, "__self__", None), str):
                _check_widths((*args, *kwargs.values()))
            return super().call(context, function, *args, **kwargs)

    return Environment


def _bits(operator: str, left: Any, right: Any) -> int:
    """Returns the number of bits of a product or power of integers at most; 0 for any other operation."""
    if not isinstance(left, int) or not isinstance(right, int) or operator not in ("*", "**"):
        return 0
    return left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * right


def _items(operator: str, left: Any, right: Any) -> int:
    """Returns the length of a text or list that an operation makes; 0 for numbers."""
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        return 0
    if operator == "+":
        return _length(left) + _length(right)
    count = (_length(left), right) if isinstance(right, int) else (_length(right), left)
    return count[0] * count[1] if operator == "*" and isinstance(count[1], int) else 0


def _check_widths(arguments: Iterable[Any]) -> None:
    from jinja2.exceptions import SecurityError

    if any(isinstance(value, int) and value > _MAX_WIDTH for value in arguments):
        raise SecurityError(f"a width above {_MAX_WIDTH:,}")


def _limited(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _check_widths((*args, *kwargs.values()))
        return function(*args, **kwargs)

    return call


class _Dict:
    """Makes a dict, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: Any) -> NoReturn:
    raise _Refused(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # the filter of jinja2 escapes characters of HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


if __name__ == "__main__":
    main()
