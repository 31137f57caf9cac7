"""Spaces on models of the Hub: each is built, served and asked in a fresh process that knows ids only."""

import pytest
from foreign_processes import run_client
from hub_server import HubServer
from tiny_checkpoints import save_checkpoints
from tiny_pipelines import make_drift

pytest.importorskip("gradio", minversion="6.0")
CODE = """
    import importlib.util
    from gradio_client import Client, handle_file
    from hf_dpssl.pages.demo_outputs import example_pictures
    from hf_dpssl.runs.shipped_folders import shipped_folder
    from hf_dpssl.pages.space_page import launch

    def ask(name, **calls):  # {event: its values}
        spec = importlib.util.spec_from_file_location(name, shipped_folder("spaces") / name / "app.py")
        app = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(app)
        page = app.build()
        _, url, _ = launch(page, app.CSS, prevent_thread_lock=True, quiet=True)
        client = Client(url, verbose=False)
        found = [client.predict(*values, api_name=f"/{event}") for event, values in calls.items()]
        page.close()
        return found

    first, second = (handle_file(path) for path in example_pictures(2))
    controls = ["one", 2, 5, 1.5, 3, 1, 0]
    report["dit"] = ask("image_generator", draw=["dit", *controls])
    report["tokens"] = ask("image_generator", draw=["token transformer", *controls])
    report["latent_lab"] = ask(
        "latent_lab", compare=[first], morph=[first, second, True], draw=["no class", 2, 5, 1.5, 3]
    )
    from hf_dpssl.pages.demo_outputs import about_models, find_models
    report["about"] = about_models(find_models("dit", "dae"))
    report["encoder_explorer"] = ask("encoder_explorer", explore=[first, 3])
"""


@pytest.mark.slow
def test_every_space_with_models_works_on_hub_ids_and_asks_no_other_host(tmp_path):
    folders = save_checkpoints(tmp_path, ("encoder", "autoencoder", "dit", "token"))
    drift = make_drift()
    drift.save_pretrained(tmp_path / "drift")
    drift.vae.save_pretrained(tmp_path / "joint")
    (tmp_path / "home").mkdir()
    with HubServer() as server:
        commit = server.add_repo("model", "org/dit", folders["dit"])
        places = {"ar": "token", "dae": "autoencoder", "joint": "joint", "drift": "drift", "t-moco-v2": "encoder"}
        for name, folder in places.items():
            server.add_repo("model", f"org/{name}", tmp_path / folder)
        models = {"DPSSL_DIT": f"org/dit@{commit}", "DPSSL_TOKENS": "org/ar", "DPSSL_DAE": "org/dae"}
        models |= {"DPSSL_DAE_GENERATOR": "org/dit", "DPSSL_JOINT_GENERATOR": "org/drift"}
        models |= {"DPSSL_JOINT": "org/joint", "DPSSL_ENCODER": "org/t-moco-v2", "DPSSL_DEMO": str(tmp_path / "none")}
        report = run_client(CODE, server, tmp_path / "home", **models)
    for name, source in (("dit", f"'org/dit', revision='{commit}'"), ("tokens", "'org/ar'")):
        grid, state, file, code = report[name][0]
        assert grid.count("<img") == 2 and "2 pictures in" in state and "pictures.zip" in str(file)
        assert f"from_pretrained({source})" in code
    assert report["about"].count("trained on digits, time not recorded") == 2  # as results.json says, of a pipeline too
    compared, morphed, drawn = report["latent_lab"]
    assert drawn.count("<img") == 4 and drawn.count("<section>") == 2
    assert str(compared).count("<section>") == 2 and "through the joint latents" in str(morphed)
    neighbours, place = report["encoder_explorer"][0]
    assert neighbours.count("<img") == 3 and "iframe" in place
