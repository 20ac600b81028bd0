"""Settings: the folders of a project are the same from everywhere, and no secret is shown."""

import json
import traceback
from pathlib import Path

import pytest

from embeddings_pipeline.config.definition import CollectionAttributes, CollectionDefinition
from embeddings_pipeline.config.settings import load_settings, revealed
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.store.database import open_database


def test_relative_folders_are_below_the_project_and_stay_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, shell, cron = (tmp_path / name for name in ("project", "shell", "cron"))
    for folder in (project, shell, cron, project / "below"):
        folder.mkdir()
    (project / ".env").write_text("EMBEDDINGS_STATE_DIR=data/state\nEMBEDDINGS_DEFS_DIR=../defs\nLAKE_URI=data/lake\n")
    (project / "dagster.yaml").touch()
    monkeypatch.setenv("DAGSTER_HOME", str(project))
    for folder in (shell, cron):
        monkeypatch.chdir(folder)
        settings = load_settings()
        assert (settings.state_dir, revealed(settings.lake_uri)) == (project / "data/state", str(project / "data/lake"))
        assert settings.defs_dir == tmp_path / "defs"
    monkeypatch.delenv("DAGSTER_HOME")
    monkeypatch.chdir(project / "below")
    settings = load_settings()
    monkeypatch.chdir(cron)
    assert settings.state_dir == project / "data/state"


def test_absolute_folders_and_urls_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("EMBEDDINGS_STATE_DIR", "/srv/state")
    monkeypatch.setenv("LAKE_URI", "s3://bucket/path")
    assert load_settings().state_dir == Path("/srv/state")
    assert revealed(load_settings().lake_uri) == "s3://bucket/path"


SECRETS = {
    "DATABASE_URL": "postgresql://user:s3cret@127.0.0.1:1/name",
    "LAKE_URI": "s3://key:s3cret@bucket/path",
    "OPENAI_API_KEY": "s3cret",
    "OPENAI_BASE_URL": "https://user:s3cret@host/v1",
    "ALERT_WEBHOOK_URL": "https://host/s3cret",
}


def test_no_print_dump_or_traceback_shows_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    database = open_database(settings)
    url = "postgresql://user:s3cret@host/name"
    source = {"table": "t", "key": ["id"], "url": url}
    attributes = CollectionAttributes.model_validate({"name": "t", "source": source, "vectors": {"base": "{x}"}})
    replaced = settings.model_copy(update={"database_url": url})
    shown = [f"{one!r} {one!s}" for one in (settings, database, attributes, CollectionDefinition(attributes))]
    for one in (settings, replaced):
        shown += [str(one.model_dump()), one.model_dump_json(), str(dict(one)), str(vars(one))]
        shown.append(json.dumps(one.model_dump(), default=str))
    try:
        database.connect()
    except PipelineError as error:
        shown.append("".join(traceback.format_exception(error)))
    assert revealed(settings.database_url) == SECRETS["DATABASE_URL"] and revealed(replaced.database_url) == url
    assert len(shown) == 15 and all("s3cret" not in text for text in shown)
