"""`dg scaffold defs embeddings_pipeline.EmbeddingCollection`: a `defs.yaml` that works at once."""

import pytest
import yaml

from embeddings_pipeline.config.definition import CollectionAttributes, CollectionDefinition
from embeddings_pipeline.config.loading import load_collections
from embeddings_pipeline.errors import PipelineError
from embeddings_pipeline.pipeline.propose import propose_collection
from embeddings_pipeline_tests.orchestration.test_component import dg_command, project  # noqa: F401
from embeddings_pipeline_tests.support.workbench import PROFILE, committed, execute, sync_once

SCAFFOLD = ("scaffold", "defs", "embeddings_pipeline.EmbeddingCollection")

FILMS = """
CREATE TABLE films (
    overview text, imdb_id varchar(20) UNIQUE NOT NULL, id bigint PRIMARY KEY, url text, title text, runtime int,
    genres text[], details jsonb, is_removed boolean DEFAULT false, updated_at timestamptz DEFAULT now());
INSERT INTO films SELECT repeat('A long story about film ' || n || '. ', 12), 'tt' || n, n, 'https://example.com/' || n,
    'Film ' || n, 90, '{Drama}', '{}', n = 5 FROM generate_series(1, 5) n
"""


def proposed(tmp_path, settings, table, name="mine", **options) -> CollectionDefinition:
    """The collection that the scaffolder writes, with the deterministic encoder."""
    text = propose_collection(name, table, options.pop("url", None), settings, **options)
    path = tmp_path / "defs" / name / "defs.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}  profile: {PROFILE}\n", encoding="utf-8")
    return load_collections(path.parent)[name]


def test_what_it_writes_for_a_table_of_films_syncs_at_once(database, settings, tmp_path):
    execute(database, FILMS)
    one = proposed(tmp_path, settings, "films")
    source = one.attributes.source
    assert (source.table, source.key, source.updated_at) == ("films", ("id",), "updated_at")
    assert source.where == '"is_removed" IS NOT TRUE'
    assert one.attributes.vectors == {"base": "{title} | {overview} | {imdb_id}"}
    assert one.attributes.columns == ("imdb_id", "url", "title", "runtime", "genres")  # short ones
    [hint] = [line for line in one.path.read_text().splitlines() if line.startswith("  # filters: ")]
    filters = yaml.safe_load(hint.removeprefix("  # filters: "))
    assert filters == {"runtime": "number", "genres": "texts"}  # which is right as it stands
    CollectionAttributes.model_validate({**one.attributes.model_dump(exclude_defaults=True), "filters": filters})
    assert sync_once(one, settings)[1] == 4
    assert committed(database, "mine")["1"][0].startswith("Film 1 | A long story about film 1.")


@pytest.mark.parametrize(
    ("column", "gone"),
    [
        ("deleted_at timestamptz", "now()"),
        ("deleted_at text", "'2024-08-30T10:00:00'"),
        ("archived_at timestamp", "now()"),
        ("deleted_on date", "now()"),
        ('"Is_Deleted" boolean', "true"),
        ("is_archived smallint", "1"),
        ("status text", "'deleted'"),
        ("state varchar(20)", "'Archived'"),
    ],
)
def test_what_is_marked_as_gone_is_left_out(database, settings, tmp_path, column, gone):
    execute(database, f"CREATE TABLE posts (id int PRIMARY KEY, title text, body text, {column})")
    execute(database, "INSERT INTO posts SELECT n, 'Post ' || n, 'a body' FROM generate_series(1, 4) n")
    execute(database, f"INSERT INTO posts SELECT n, 'Post ' || n, 'a body', {gone} FROM generate_series(5, 9) n")
    one = proposed(tmp_path, settings, "posts")
    assert sync_once(one, settings)[1] == 4
    assert column.split()[0].strip('"') not in one.attributes.columns


def test_several_marks_count_together_and_a_status_of_the_living_is_none(database, settings, tmp_path):
    execute(
        database,
        """CREATE TABLE posts (id int PRIMARY KEY, title text, status text, deleted_at timestamptz, archived_at date);
           INSERT INTO posts VALUES (1, 'one', 'draft', NULL, NULL), (2, 'two', 'live', now(), NULL),
               (3, 'three', 'live', NULL, now())""",
    )
    one = proposed(tmp_path, settings, "posts")
    assert one.attributes.source.where == '"deleted_at" IS NULL AND "archived_at" IS NULL'
    assert "status" in one.attributes.columns and sync_once(one, settings)[1] == 1


def test_a_column_of_vectors_is_pointed_out(database, settings):
    execute(database, "CREATE TABLE notes (id int PRIMARY KEY, body text, vec vector(32))")
    execute(database, "INSERT INTO notes VALUES (1, 'a long note about something', NULL)")
    text = propose_collection("mine", "notes", None, settings)
    assert "  # The table has vectors in vec: to keep them there, say which profile made them." in text.splitlines()
    adopted = text.replace("# destination: ", "destination: ").replace("profile: minilm}", f"profile: {PROFILE}}}")
    one = CollectionDefinition(CollectionAttributes.model_validate(yaml.safe_load(adopted)["attributes"]))
    sync_once(one, settings)
    assert execute(database, "SELECT count(vec) FROM notes") == [(1,)]


def test_every_choice_is_explained_in_a_comment(database, settings):
    execute(database, FILMS)
    lines = propose_collection("mine", "films", None, settings).splitlines()
    keys = [
        n for n, line in enumerate(lines) if line.strip().split(":")[0] in ("key", "updated_at", "where", "columns")
    ]
    assert len(keys) == 4 and all(lines[n - 1].strip().startswith("#") for n in keys)


def test_a_composite_key_is_in_the_order_of_the_primary_key(database, settings, tmp_path):
    execute(database, """CREATE TABLE t (title text, a int, b int, c int, PRIMARY KEY (c, a) INCLUDE (b));
                         INSERT INTO t VALUES ('x y', 1, 2, 3)""")  # fmt: skip
    one = proposed(tmp_path, settings, "t")
    assert one.attributes.source.key == ("c", "a")
    sync_once(one, settings)
    assert list(committed(database, "mine")) == ['["3", "1"]']


def test_a_unique_index_on_not_null_columns_is_a_key_too(database, settings, tmp_path):
    execute(database, "CREATE TABLE t (a text UNIQUE, b text NOT NULL, title text, UNIQUE (b))")
    assert proposed(tmp_path, settings, "t").attributes.source.key == ("b",)


def test_a_view_needs_the_key_to_be_named(database, settings, tmp_path):
    execute(database, FILMS)
    execute(database, "CREATE VIEW seen AS SELECT id, title FROM films")
    with pytest.raises(PipelineError, match=r"'seen' has no primary key .* name the columns .* with --key"):
        proposed(tmp_path, settings, "seen")
    with pytest.raises(PipelineError, match=r"no column 'ID' .*did you mean 'id'.*it has id, title"):
        proposed(tmp_path, settings, "seen", key=["ID"])
    assert sync_once(proposed(tmp_path, settings, "seen", key=["id"]), settings)[1] == 5


ODD = """
CREATE SCHEMA "Odd Schema";
CREATE TABLE "Odd Schema"."Films: ""all"" #1
yes" ("Primary ""Key"": \u2028x" bigint PRIMARY KEY, "Title: # \nyes" text, "{x}" text, "order" text, "is_Removed" int,
    "Deleted" boolean, "100%" varchar(10), "🎬 é" text);
INSERT INTO "Odd Schema"."Films: ""all"" #1
yes" VALUES (1, 'Heat', 'no', 'a word', 0, NULL, 'another', 'third')
"""


def test_any_names_are_written_so_that_they_are_read_again(database, settings, tmp_path):
    execute(database, ODD)
    one = proposed(tmp_path, settings, '"Odd Schema"."Films: ""all"" #1\nyes"')
    assert one.attributes.source.key == ('Primary "Key": \u2028x',)
    assert set(one.attributes.columns) == {"Title: # \nyes", "{x}", "order", "100%", "🎬 é"}
    assert one.attributes.source.where == 'coalesce("is_Removed", 0) = 0 AND "Deleted" IS NOT TRUE'
    sync_once(one, settings)
    assert committed(database, "mine")["1"][0] == "Heat | a word | another | third"


def test_an_empty_table_and_domains_over_text_are_embedded_by_their_types(database, settings, tmp_path):
    execute(
        database, "CREATE DOMAIN words AS text; CREATE TABLE t (id int PRIMARY KEY, plot words, name varchar(9), n int)"
    )
    assert proposed(tmp_path, settings, "t").attributes.vectors == {"base": "{name} | {plot}"}


def test_a_table_elsewhere_is_looked_at_by_its_url_which_is_written_as_it_was_given(
    database, settings, tmp_path, monkeypatch
):
    execute(database, FILMS)
    monkeypatch.setenv("ELSEWHERE", database.url)
    elsewhere = settings.model_copy(update={"database_url": "postgresql://127.0.0.1:1/x"})
    one = proposed(tmp_path, elsewhere, "films", url="${ELSEWHERE}")
    assert one.attributes.source.url == "${ELSEWHERE}"
    assert sync_once(one, settings)[1] == 4


def test_what_cannot_be_scaffolded_is_one_line(database, settings):
    execute(database, FILMS)
    execute(
        database,
        "CREATE TABLE numbers (id int PRIMARY KEY, n int, code text); INSERT INTO numbers VALUES (1, 1, '0815')",
    )
    execute(database, "CREATE TABLE keyless (title text)")
    for name, table, url, says in [
        ("mine", "film", None, "(did you mean 'films'?)"),
        ("mine", "nope.films", None, "there is no table 'nope.films'"),
        ("mine", "zzz", None, "give its name as `schema.table`"),
        ("mine", "", None, "is not the name of a table"),
        ("mine", "numbers", None, "no column with text in it"),
        ("mine", "keyless", None, "no primary key"),
        ("2films", "films", None, "'2films' is not a collection name"),
        ("batch", "films", None, "choose another name"),
        ("mine", "films", "postgresql://u:hunter2@127.0.0.1:1/x", "--url holds a password"),
        ("mine", "films", "postgresql://127.0.0.1:1/x", "`source.url:` cannot be used"),
        ("mine", "films", "nonsense", "`source.url:` does not name a PostgreSQL database"),
        ("mine", "films", "${NOT_THERE}", "${NOT_THERE}, which is not set"),
    ]:
        with pytest.raises(PipelineError) as error:
            propose_collection(name, table, url, settings)
        assert says in str(error.value) and "\n" not in str(error.value) and "hunter2" not in str(error.value)


@pytest.mark.slow
def test_dg_lists_the_component_and_shows_its_parameters(project):  # noqa: F811
    assert "embeddings_pipeline.EmbeddingCollection" in dg_command(project, "list", "components").stdout
    shown = dg_command(project, *SCAFFOLD, "--help").stdout
    assert all(option in shown for option in ("--table", "--url", "--key"))


@pytest.mark.slow
def test_dg_scaffold_writes_the_file_or_one_line_and_no_empty_folder(database, settings, project):  # noqa: F811
    execute(database, FILMS)
    environment = {"DATABASE_URL": database.url, "EMBEDDINGS_STATE_DIR": str(settings.state_dir)}
    done = dg_command(project, *SCAFFOLD, "films", "--table", "films", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert load_collections(project / "defs")["films"].attributes.source.key == ("id",)
    failed = dg_command(project, *SCAFFOLD, "more", "--table", "filmz", **environment)
    assert failed.returncode == 1
    [line] = failed.stderr.strip().splitlines()
    assert line.startswith("Error: there is no table 'filmz' in database ") and line.endswith("(did you mean 'films'?)")
    assert sorted(path.name for path in (project / "defs").iterdir() if path.name != "__pycache__") == [
        "__init__.py",
        "films",
    ]
