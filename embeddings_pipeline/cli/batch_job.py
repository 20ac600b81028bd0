"""`batch-job …`: texts that were handed to a hosted model's Batch API."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from embeddings_pipeline.cli.console import (
    JsonOption,
    ago,
    database_to_read,
    duration,
    pipeline_database,
    print_json,
    tell,
)
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.errors import ConfigurationError, PipelineError
from embeddings_pipeline.wording import counted

if TYPE_CHECKING:
    from embeddings_pipeline.encoders.batch_jobs import BatchJobs

app = typer.Typer(
    help="Batch jobs: texts that a hosted model answers within a day, at half the price.",
    no_args_is_help=True,
    suggest_commands=False,
)
CollectionOption = Annotated[str | None, typer.Option("--collection", "-c", help="Left out: of all.")]
JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="Its id, or the beginning of it, as `batch-job list` shows it.")
]
DaysOption = Annotated[
    int, typer.Option(min=0, max=36_500, help="Of those that have ended: how many days ago at most.")
]


@app.command("list")
def list_jobs(collection: CollectionOption = None, days: DaysOption = 7, as_json: JsonOption = False) -> None:
    """Each job with its state, age and price, the newest first."""
    from embeddings_pipeline.encoders.batch_jobs import BatchJobs

    settings = load_settings()
    listed = BatchJobs(database_to_read(settings), settings, collection).listed(days)
    if as_json:
        print_json(listed)
        return
    if not listed:
        print("there are no batch jobs")
    for job in listed:
        print(line_of(job))


def line_of(job: dict[str, Any]) -> str:
    """A job for people."""
    says = f" (the server says: {job['remote_state']})" if job["remote_state"] else ""
    counts = f"{counted(job['texts'], 'text')}, {job['answered']:,} answered"
    counts += f", {job['remote_done']:,} done at the server" if job["ended_at"] is None else ""
    counts += "".join(f", {job[name]:,} {name}" for name in ("refused", "unanswered") if job[name])
    price = f"${job['billed_usd']:,.4f} of ${job['usd']:,.4f}" if job["priced"] else "price unknown"
    since = f"made {ago(job['made_at'])}"
    since += f", ended {ago(job['ended_at'])} after {duration(job['age_seconds'])}" if job["ended_at"] else ""
    reason = f"; {job['reason']}" if job["reason"] else ""
    name = f"{job['id']}  {job['collection']} ({job['profile']})"
    return f"{name}: {job['state']}{says}; {counts}; {price}; {since}{reason}"


@app.command("fetch")
def fetch(collection: CollectionOption = None, as_json: JsonOption = False) -> None:
    """Look at each job now, and fetch what was answered. The sensor and each `sync` do so too; `sync` commits it."""
    from embeddings_pipeline.encoders.batch_jobs import BatchJobs

    settings = load_settings()
    jobs, errors = BatchJobs(pipeline_database(settings), settings, collection), []
    for job in jobs.due(now=True):
        try:
            jobs.look(job)
        except PipelineError as error:
            errors.append(error)
    listed = jobs.listed()
    at_work = sum(job["ended_at"] is None for job in listed)
    if as_json:
        print_json(listed)
    else:
        print(f"{counted(at_work, 'batch job')} at work; see `embeddings-pipeline batch-job list`")
    for each in errors[:-1]:
        tell(f"error: {each}")
    if errors:
        raise errors[-1]


@app.command("cancel")
def cancel(job: JobArgument, as_json: JsonOption = False) -> None:
    """Have the server end a job. What it has answered until then is paid for, and kept; the rest is free again."""
    from embeddings_pipeline.encoders.batch_jobs import BatchJobs

    settings = load_settings()
    jobs = BatchJobs(pipeline_database(settings), settings)
    chosen = _chosen(jobs, job)
    state = jobs.cancel(chosen)
    if as_json:
        print_json({"id": chosen, "state": state})
        return
    print(f"{chosen}: the server says that it is {state}; what it has answered is fetched once it has ended")


@app.command("forget")
def forget(job: JobArgument, as_json: JsonOption = False) -> None:
    """End a job whose server or key is gone. Its texts are free, and may be paid for once more; what the server answers
    all the same, within 30 days, is kept.
    """
    from embeddings_pipeline.encoders.batch_jobs import BatchJobs

    settings = load_settings()
    jobs = BatchJobs(pipeline_database(settings), settings)
    chosen = _chosen(jobs, job)
    jobs.forget(chosen)
    if as_json:
        print_json({"id": chosen, "state": "forgotten"})
        return
    print(f"{chosen}: forgotten; its texts are free")


def _chosen(jobs: "BatchJobs", beginning: str) -> str:
    """The one job whose id begins so."""
    chosen = [each["id"] for each in jobs.listed() if beginning and each["id"].startswith(beginning)]
    if len(chosen) != 1:
        many = "several batch jobs begin" if chosen else "no batch job of the last week begins"
        raise ConfigurationError(f"{many} with {beginning!r}: see `embeddings-pipeline batch-job list`")
    return str(chosen[0])
