"""The subcommand `hf-dpssl space`: start a packaged Space on this machine, publish it, or write it as files."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import runpy
import sys
from importlib import metadata
from pathlib import Path

from ..pages.demo_outputs import MODELS
from ..runs.console import say
from ..runs.shipped_folders import shipped_folder
from .parsing import command_parser, parse_command

STATIC = {"image_generator": "one step", "encoder_explorer": "encoder"}  # page without a server: its model in MODELS
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def space_names() -> list[str]:
    """Names of the Spaces."""
    return sorted(path.parent.name for path in shipped_folder("spaces").glob("*/app.py"))


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = command_parser(
        "space",
        "Start a Gradio page on this machine, on the models that `hf-dpssl demo` wrote or on others; or "
        "publish it as a Space with --push, with the token of `hf auth login` or HF_TOKEN; or write a folder with "
        "--static whose page computes in the browser.",
    )
    parser.add_argument("name", choices=space_names(), help="which page")
    parser.add_argument("--port", type=_port, help="default: the first free one from 7860 on")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1); 0.0.0.0: all")
    parser.add_argument("--demo", metavar="FOLDER", help="outputs of `hf-dpssl demo` (default: outputs/demo)")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER_OR_ID",
                        help=f"use this one, with --push a Hub id; names: {', '.join(MODELS)}")  # fmt: skip
    parser.add_argument("--push", metavar="ORG/NAME", help="publish the page as this Space instead of starting it")
    parser.add_argument(
        "--package", metavar="URL", help="with --push: from where the Space's pip gets hf_dpssl, where this one was "
        "installed from a folder",
    )  # fmt: skip
    parser.add_argument("--private", action="store_true", help="a Space that is made is private")
    parser.add_argument(
        "--static", metavar="FOLDER", help=f"write a page that needs no server ({', '.join(STATIC)}; needs "
        "hf_dpssl[onnx], and npm or a network at the first time); --model FOLDER_OR_ID is its model",
    )  # fmt: skip
    parser.add_argument(
        "--embeddings", metavar="FOLDER", help="with --static: pictures of encoder_explorer, embedded by hf-dpssl embed"
    )
    parser.add_argument("--overwrite", action="store_true", help="with --static: replace an earlier page")
    return parser


def main(argv: list[str]) -> int:
    """`hf-dpssl space`: returns the exit status."""
    options = parse_command(parser(), argv)
    if options.static is not None:
        return _write_static(options)
    if options.embeddings is not None or options.overwrite:
        return _refuse("--embeddings and --overwrite are for --static.")
    models = {}
    for given in options.model:
        name, sign, source = given.partition("=")
        if name not in MODELS or not source:
            return _refuse(f"--model is NAME=FOLDER_OR_ID with a name of {sorted(MODELS)}, got {given!r}.")
        models[name] = source
    if options.push is not None:
        return _push(options, models)
    if options.package is not None:
        return _refuse("--package is for --push.")
    variables = {"GRADIO_SERVER_NAME": options.host or "127.0.0.1", "GRADIO_ANALYTICS_ENABLED": "False"}
    if options.port is not None:
        variables["GRADIO_SERVER_PORT"] = str(options.port)
    if options.demo is not None:
        if not Path(options.demo).is_dir():
            return _refuse(f"no folder {options.demo!r}: give the --output_dir of `hf-dpssl demo`.")
        variables["DPSSL_DEMO"] = options.demo
    variables |= {MODELS[name][0]: source for name, source in models.items()}
    if importlib.util.find_spec("gradio") is None:
        return _refuse("gradio is not installed: pip install 'hf_dpssl[demo]'.")
    os.environ.update(variables)
    sys.argv = [str(shipped_folder("spaces") / options.name / "app.py")]
    runpy.run_path(sys.argv[0], run_name="__main__")  # here: another process would import every library once more
    return 0


def push_space(
    name: str,
    repo_id: str,
    *,
    private: bool | None = None,
    models: dict[str, str] | None = None,
    package: str | None = None,
) -> str:
    """Publish a Space's folder as one commit; returns the commit's address. Other files of the repository stay.

    Args:
        name: one of `space_names()`.
        repo_id: ORG/NAME; made when missing.
        private: of a Space that is made; None: as the organisation's default.
        models: Hub id (`id@revision`) by a name of MODELS: become variables of the Space, and `models:` of its README.
        package: where pip gets hf_dpssl from; default: from where this one was installed.

    Raises:
        ValueError: a model that is no Hub id, or an installation that only this machine has.
        hub.PushError: the Hub refuses or cannot be reached.
    """
    from ..hub.card_merge import with_entries
    from ..hub.publishing import Target

    for model, source in (models or {}).items():
        if Path(source).exists() or not _HUB_ID.fullmatch(source):
            raise ValueError(
                f"--model {model}={source}: a Space sees no folder of this machine. Publish it with hf-dpssl push, and "
                "give its id."
            )
    files = {path.name: path for path in sorted((shipped_folder("spaces") / name).iterdir()) if path.is_file()}
    contents = dict(files) | {"requirements.txt": f"{requirement(package)}\n".encode()}
    if models:
        entry = {"models": sorted(source.partition("@")[0] for source in models.values())}
        contents["README.md"] = with_entries(
            files["README.md"].read_text(encoding="utf-8"), entry, ("models",)
        ).encode()
    target = Target(repo_id, repo_type="space", space_sdk="gradio", private=private)
    target.set_variables({MODELS[model][0]: source for model, source in (models or {}).items()})
    return target.commit(contents, f"Push {name}").url


def requirement(package: str | None = None) -> str:
    """The line of requirements.txt for this package: `package`, or from where it was installed (PEP 610).

    Raises:
        ValueError: it was installed from a folder or file of this machine, which pip cannot reach elsewhere.
    """
    if package is not None:
        return f"hf_dpssl[demo] @ {package}" if "://" in package else package
    try:
        installed = metadata.distribution("hf_dpssl")
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        origin = {"url": "file:"}
    url, commit = origin.get("url", ""), origin.get("vcs_info", {}).get("commit_id")
    if commit:
        return f"hf_dpssl[demo] @ {origin['vcs_info']['vcs']}+{url}@{commit}"
    if not origin:
        return f"hf_dpssl[demo]=={installed.version}"
    if url.startswith("https://"):
        return f"hf_dpssl[demo] @ {url}"
    raise ValueError(
        "hf_dpssl is installed from a folder of this machine, which the Space cannot reach: name with --package from "
        "where pip gets it, such as git+https://github.com/ORG/NAME@COMMIT or the address of a wheel."
    )


def _push(options: argparse.Namespace, models: dict[str, str]) -> int:
    if options.demo or options.port:
        return _refuse("--push takes no --port or --demo, which are of this machine.")
    url = push_space(
        options.name, options.push, private=options.private or None, models=models, package=options.package
    )
    say(f"{options.name} is published: {url}")
    return 0


def _write_static(options: argparse.Namespace) -> int:
    if options.push or options.package or options.private or options.port or options.host:
        return _refuse("--static takes no --push, --package, --private, --port or --host.")
    if sum(map(bool, (options.demo, options.model, options.embeddings))) > 1 and not (
        options.model and options.embeddings and not options.demo
    ):
        return _refuse("--demo names the models itself: give it, or --model and --embeddings.")
    if options.name not in STATIC:
        return _refuse(f"{options.name} has no page without a server: {' and '.join(STATIC)} have.")
    if len(options.model) > 1:
        return _refuse(f"a page without a server has one model, got {options.model}.")
    if options.demo is not None:
        os.environ["DPSSL_DEMO"] = options.demo
    from ..convert.static_spaces import write_static_space

    source = options.model[0].removeprefix(f"{STATIC[options.name]}=") if options.model else None
    how = {"embeddings": options.embeddings, "overwrite": options.overwrite}
    files = write_static_space(options.name, options.static, source, **how)
    say(f"{options.static}: {sum(files.values()):,} bytes; open index.html, or serve the folder")
    for name, size in files.items():
        say(f"  {name}: {size:,} bytes")
    return 0


def _refuse(message: str) -> int:
    print(f"hf-dpssl space: {message}", file=sys.stderr)
    return 2


def _port(text: str) -> int:
    port = int(text)
    if not 1 <= port <= 65535:
        raise ValueError(text)
    return port


_port.__name__ = "port (1 to 65535)"  # as argparse's message calls it
