"""The Hugging Face hub: what is published opens again, pinned; what cannot be opened is refused by reason."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from huggingface_hub import close_session
from huggingface_hub.repocard import metadata_load

from biopsy.core.errors import DataError, HubError, RunError
from biopsy.core.files import read_json
from biopsy.evaluation.predict import predict
from biopsy.exporting.bundles import export
from biopsy.exporting.hub import publish
from biopsy.training.open_model import open_classifier
from command_line import call
from conftest import encode_png
from hub_server import hub  # noqa: F401


@pytest.fixture(scope="module")
def bundle(trained_run, tmp_path_factory):
    return export(trained_run, tmp_path_factory.mktemp("hub") / "bundle").path


def test_a_published_classifier_predicts_the_same_at_its_commit(hub, bundle, trained_run, tmp_path):  # noqa: F811
    result = publish(bundle, "lab/breast")
    assert hub.repositories["lab/breast"][result.commit].keys() == set(result.files)
    patch = trained_run.open_pack(verify=False).patches[0]
    (tmp_path / "patch.png").write_bytes(encode_png(np.array(patch)))
    remote = predict("hf:lab/breast", tmp_path / "patch.png", out=tmp_path / "remote.csv")
    local = predict(bundle, tmp_path / "patch.png", out=tmp_path / "local.csv")
    np.testing.assert_array_equal(remote.frame.filter(like="prob_"), local.frame.filter(like="prob_"))
    assert read_json(tmp_path / "remote.csv.json")["classifier_source"] == result.model
    assert open_classifier("hf:lab/breast").source == result.model == f"hf:lab/breast@{result.commit}"


def test_a_commit_stays_pinned_and_opens_offline(hub, bundle, trained_run):  # noqa: F811
    first = publish(bundle, "lab/breast")
    digest = open_classifier(first.model).sha256
    hub.repositories["lab/breast"]["f" * 40] = {"README.md": b"# emptied"}
    assert open_classifier(first.model).sha256 == digest
    with pytest.raises(HubError) as error:
        open_classifier("hf:lab/breast")
    assert (error.value.reason, error.value.repository) == ("not-a-classifier", "lab/breast")
    hub.stop()
    assert open_classifier(first.model).sha256 == digest
    with pytest.raises(HubError) as error:
        open_classifier("hf:lab/other")
    assert error.value.reason == "offline"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("lab/none", "missing"), ("lab/breast@v9", "revision"), ("breast", "name"), ("a/b/c", "name")],
)
def test_repositories_and_files_missing_on_the_hub_are_refused(hub, name, reason):  # noqa: F811
    hub.repositories["lab/breast"] = {"a" * 40: {"README.md": b"# nothing"}}
    with pytest.raises(HubError) as error:
        open_classifier(f"hf:{name}")
    assert error.value.reason == reason and "\n" not in str(error.value)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "none://proxy", "refusing"])
def test_a_proxy_that_does_not_work_is_an_error_of_ours(hub, bundle, proxy, monkeypatch, request):  # noqa: F811
    """No server at its port, kinds that cannot be used, and a server that is no proxy."""
    monkeypatch.setenv("HTTPS_PROXY", os.environ["HF_ENDPOINT"] if proxy == "refusing" else proxy)
    monkeypatch.delenv("HF_ENDPOINT")
    close_session()  # the library asks for the proxy once
    request.addfinalizer(close_session)
    for work in (lambda: open_classifier("hf:lab/breast"), lambda: publish(bundle, "lab/breast")):
        with pytest.raises(HubError) as error:
            work()
        assert error.value.reason == "offline" and "\n" not in str(error.value)


@pytest.mark.slow  # a process of its own: the hub's library reads the setting when it is imported
@pytest.mark.parametrize("options", [[], ["--quiet"]])
def test_quiet_has_no_progress_bar_of_the_hub(hub, bundle, tmp_path, options):  # noqa: F811
    publish(bundle, "lab/breast")
    (tmp_path / "patch.png").write_bytes(encode_png(np.zeros((16, 16, 3), np.uint8)))
    program = "from biopsy.cli.app import main; main()"
    command = [sys.executable, "-c", program, "predict", "hf:lab/breast", "patch.png", *options]
    environment = {name: value for name, value in os.environ.items() if "PROGRESS" not in name}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "TQDM_DISABLE": ""}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0
    assert ("it/s" in result.stderr or "%|" in result.stderr) == (not options)


def test_no_code_is_downloaded(hub, bundle):  # noqa: F811
    folder = open_classifier(publish(bundle, "lab/breast").model).path
    assert {path.name for path in folder.iterdir()} == {"classifier.json", "weights.safetensors", "README.md"}


def test_only_an_unaltered_bundle_is_published(hub, bundle, tmp_path):  # noqa: F811
    with pytest.raises(DataError):
        publish(tmp_path, "lab/breast")
    copied = shutil.copytree(bundle, tmp_path / "copied")
    (copied / "patients.csv").write_text("a name")
    (copied / "README.md").write_text("---\nlicense: mit\n---\n# Edited by hand\n")
    result = publish(copied, "lab/breast")
    files = hub.repositories["lab/breast"][result.commit]
    assert "patients.csv" not in files and b"Edited by hand" in files["README.md"]
    with (copied / "weights.safetensors").open("ab") as file:
        file.write(b"0")
    with pytest.raises(RunError):
        publish(copied, "lab/breast")


def test_the_card_begins_with_what_the_hub_reads(bundle, trained_run):
    metadata = metadata_load(bundle / "README.md")
    assert metadata["library_name"] == "biopsy" and metadata["pipeline_tag"] == "image-classification"
    assert metadata["license"] == "other" and metadata["license_name"]
    assert (bundle / "README.md").read_text().startswith("---\n")


def test_the_commands(hub, bundle, tmp_path):  # noqa: F811
    published = call("publish", bundle, "lab/breast", "--json")
    assert published.exit_code == 0
    missing = call("predict", "hf:lab/none", str(tmp_path), "--out", str(tmp_path / "p.csv"))
    assert missing.exit_code == 1 and missing.stderr.count("\n") == 1
