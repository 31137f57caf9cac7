"""Spaces under ZeroGPU: its package `spaces` is imitated by one that decorates, forgets and pickles as it does."""

import os
import textwrap
from json import loads
from pathlib import Path

import pytest
from forked_processes import run_forked
from tiny_checkpoints import autoencoder_model, save_checkpoints

pytest.importorskip("gradio", minversion="6.0")
REPOSITORY = Path(__file__).parents[2]
# As spaces 0.51 does it: the function runs elsewhere, does not wait for its reader, and only gradio's errors are told.
PACKAGE = """
    import functools, inspect, pickle, sys
    import torch
    assert "gradio" not in sys.modules and "hf_dpssl" not in sys.modules, "imported too late"
    granted = []

    def GPU(duration):
        def decorate(function):
            granted.append(duration)

            @functools.wraps(function)
            def call(*arguments):
                import gradio
                try:
                    result = function(*pickle.loads(pickle.dumps(arguments)))
                    kept = [pickle.dumps(item) for item in (result if inspect.isgenerator(result) else [result])]
                except gradio.Error:
                    raise
                except Exception as error:
                    raise gradio.Error(f"ZeroGPU worker error: {type(error).__name__}")
                return list(map(pickle.loads, kept))

            def regular(*arguments):
                return call(*arguments)[0]

            def generator(*arguments):
                yield from call(*arguments)

            return generator if inspect.isgeneratorfunction(function) else regular
        return decorate
"""
CODE = """
    import importlib.util, json, os, sys
    from pathlib import Path

    def serve(name):
        spec = importlib.util.spec_from_file_location(name, f"{os.environ['REPOSITORY']}/spaces/{name}/app.py")
        app = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(app)
        from hf_dpssl.pages.space_page import launch
        page = app.build()
        url = launch(page, app.CSS, prevent_thread_lock=True, quiet=True)[1]
        from gradio_client import Client
        return Client(url, verbose=False)

    def attempt(client, *values, **options):
        try:
            return client.predict(*values, **options)
        except Exception as error:
            return str(error)

    report, name = {}, os.environ["SPACE"]
    client = serve(name)
    import spaces
    from gradio_client import handle_file
    from hf_dpssl.pages.demo_outputs import example_pictures
    report["granted"] = len(spaces.granted)
    first, second = (handle_file(path) for path in example_pictures(2))
    Path("bad.png").write_text("no picture")
    bad = handle_file("bad.png")
    if name == "image_generator":
        report["good"] = [client.predict("dit", "one", 2, 5, 1.5, 3, 1, 0, api_name="/draw")]
        report["bad"] = [attempt(client, "dit", "one", 2, None, 1.5, 3, 1, 0, api_name="/draw")]
    elif name == "latent_lab":
        report["good"] = [client.predict(first, api_name="/compare"),
                          client.predict(first, second, True, api_name="/morph"),
                          client.predict("one", 2, 5, 1.5, 3, api_name="/draw")]
        report["bad"] = [attempt(client, bad, api_name="/compare"),
                         attempt(client, first, bad, True, api_name="/morph")]
        assert "one, seed 6" in report["good"][2]
    else:
        report["good"] = [client.predict(first, 3, api_name="/explore")]
        report["bad"] = [attempt(client, bad, 3, api_name="/explore")]
    Path("report.json").write_text(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, granted, shown, said",
    [
        ("image_generator", 1, "2 pictures in", "Give a number of pictures and a seed"),
        ("latent_lab", 3, "reconstruction", "no picture of a known type"),
        ("encoder_explorer", 1, "nearest neighbours", "no picture of a known type"),
    ],
)
def test_space_works_behind_the_decorator_and_its_errors_stay_readable(tmp_path, name, granted, shown, said):
    save_checkpoints(tmp_path / "demo", ("encoder", "autoencoder", "dit"))
    autoencoder_model(seed=1).save_pretrained(tmp_path / "demo" / "comparison" / "dae")
    (tmp_path / "packages" / "spaces").mkdir(parents=True)
    (tmp_path / "packages" / "spaces" / "__init__.py").write_text(textwrap.dedent(PACKAGE))
    variables = {
        "PYTHONPATH": f"{tmp_path / 'packages'}{os.pathsep}{REPOSITORY}", "DPSSL_DEMO": str(tmp_path / "demo"),
        "SPACE": name, "REPOSITORY": str(REPOSITORY), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = run_forked(["-c", textwrap.dedent(CODE)], tmp_path, os.environ | variables)
    assert done.returncode == 0, done.stderr
    report = loads((tmp_path / "report.json").read_text())
    assert report["granted"] == granted and shown in str(report["good"])
    assert all(said in text for text in report["bad"]), report["bad"]
