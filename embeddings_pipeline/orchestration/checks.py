"""A collection's checks, and its nightly audit. The quick checks run with the indexes, all of them with the audit."""

import math
from collections.abc import Mapping
from typing import Any

import dagster as dg

from embeddings_pipeline.config.definition import CollectionDefinition
from embeddings_pipeline.config.prices import is_paid
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.encoders.spend import DAYS, spend
from embeddings_pipeline.errors import ProfileError
from embeddings_pipeline.health.audit import audit, build_again
from embeddings_pipeline.health.check_results import SEARCH_QUALITY, CheckResult, Severity, note_result
from embeddings_pipeline.health.coverage import coverage, uncovered_batches
from embeddings_pipeline.health.drift import LEAST_COSINE, measure
from embeddings_pipeline.health.failures import failures as failures_of
from embeddings_pipeline.health.failures import waiting
from embeddings_pipeline.health.freshness import freshness
from embeddings_pipeline.health.integrity import integrity
from embeddings_pipeline.health.truncation import in_words, truncation
from embeddings_pipeline.index.faiss_read import open_index
from embeddings_pipeline.index.parity import check_parity
from embeddings_pipeline.orchestration.alerts import alert_of_check
from embeddings_pipeline.orchestration.asset_options import ENCODER_POOL, asset_options
from embeddings_pipeline.orchestration.names import asset_key
from embeddings_pipeline.orchestration.resources import PipelineResource
from embeddings_pipeline.orchestration.steps import failures, failures_kept
from embeddings_pipeline.pipeline.collection import Collection
from embeddings_pipeline.wording import counted, many, texts_and_items

QUICK = ("coverage", "integrity", "quarantine", "truncation", "spend", "freshness", "index_parity")
NIGHTLY = ("agreement", "model_drift")
ASSETS_OF_CHECKS = {
    **dict.fromkeys(NIGHTLY, "audit"),
    "index_parity": "faiss_index",
    SEARCH_QUALITY: "evaluation",
}  # the others' is pgvector_index
FEW_IN_QUARANTINE = 10  # so many are a warning, whatever share of all texts that is
NAMED_IN_QUARANTINE = 3
LATE_MINUTES = 60  # a change that has been seen and not committed for so long
SCAN_HOURS = 26  # since the last full scan: a day, and what it may take


def check_keys(definition: CollectionDefinition, names: tuple[str, ...]) -> list[dg.AssetCheckKey]:
    """The keys of checks by name."""

    assets = [ASSETS_OF_CHECKS.get(name, "pgvector_index") for name in names]
    return [dg.AssetCheckKey(asset_key(definition, asset), name) for name, asset in zip(names, assets, strict=True)]


def build_audit(definition: CollectionDefinition) -> dg.AssetsDefinition:
    """The asset `audit`, with its check `agreement`."""
    options = asset_options(definition, "audit", {"postgres"}, ["pgvector_index", "faiss_index"], partitioned=False)
    [key] = check_keys(definition, ("agreement",))
    spec = dg.AssetCheckSpec(
        key.name,
        asset=key.asset_key,
        description=(
            "Ledger, texts, vectors, lake and FAISS index agree with each other. What does not is made dirty, so that "
            "the next sync mends it: run `embeddings-pipeline sync --full`, which checks again."
        ),
    )

    @dg.asset(**options, check_specs=[spec])
    def audit_asset(context: dg.AssetExecutionContext, pipeline: PipelineResource) -> dg.MaterializeResult:
        """Every copy compared with the next one: ledger, texts, vectors, lake and FAISS index. What disagrees is
        counted here and made dirty, so that the next sync mends it. Every check runs with it.
        """
        with failures_kept(definition, "audit"):
            collection = pipeline.open(definition)
            differences = audit(collection)
        wrong = [_counted(count, name) for name, count in vars(differences).items() if count]
        counts = ", ".join(wrong) or "all copies agree"
        found = CheckResult(key.name, differences.agree, "error", counts)
        words = found.told(definition.name) if wrong else counts
        note_result(collection.database, definition.name, found)
        if not differences.agree:
            alert_of_check(context, definition, key, words)
        agreement = dg.AssetCheckResult(
            check_name=key.name, passed=differences.agree, description=words, metadata=vars(differences)
        )
        return dg.MaterializeResult(metadata=vars(differences), check_results=[agreement])

    return audit_asset


def _counted(count: int, name: str) -> str:
    """Of a difference: `1 item without texts`."""
    what, _, rest = name.replace("_", " ").partition(" ")
    one = next((word for word in ("item", "text", "vector", "batch") if many(2, word) == what), None)
    return f"{counted(count, one) if one else f'{count:,} {what}'} {rest}"


def build_checks(definition: CollectionDefinition, profile: Profile) -> list[dg.AssetChecksDefinition]:
    """Checks on the assets that come after the last batch is committed; `profile` is the declared one."""
    table, index = asset_key(definition, "pgvector_index"), asset_key(definition, "faiss_index")

    def result(
        context: dg.AssetCheckExecutionContext,
        collection: Collection,
        name: str,
        passed: bool,
        description: str,
        metadata: Mapping[str, Any],
        severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR,
    ) -> dg.AssetCheckResult:
        told: Severity = "error" if severity == dg.AssetCheckSeverity.ERROR else "warning"
        found = CheckResult(name, bool(passed), told, description)
        note_result(collection.database, definition.name, found)
        if found.failed:
            alert_of_check(context, definition, check_keys(definition, (name,))[0], description)
        shown = {key: value for key, value in metadata.items() if value is not None}
        return dg.AssetCheckResult(passed=bool(passed), description=description, metadata=shown, severity=severity)

    @dg.asset_check(asset=table, name="coverage")
    def coverage_check(context: dg.AssetCheckExecutionContext, pipeline: PipelineResource) -> dg.AssetCheckResult:
        """Every item has its current vectors: none missing, none stale, no vector without an item (orphan). Counted in
        the data itself, whole and by batch. It warns of what the next sync is about to do, and is an error if that does
        not help, or if the last scan or the last try of a batch failed. If it fails, run `embeddings-pipeline sync`.
        """
        with failures():
            collection = pipeline.open(definition)
            covered = coverage(collection.database, collection.model)
            batches = uncovered_batches(collection.database, collection.model)
            scans = [each for each in failures_of(collection.database, definition.name) if each.step == "scan"]
            failed = [f"the last scan failed: {each.reason}" for each in scans]
            if reason := waiting(collection.database, definition.name).reason:
                failed.append(f"batches wait, since {reason}")
        words = "; ".join([covered.told, *failed])
        error = bool(failed or covered.damaged or covered.orphans)
        severity = dg.AssetCheckSeverity.ERROR if error else dg.AssetCheckSeverity.WARN
        # Rounded down: 100 % is said only if nothing is missing.
        percent = math.floor(covered.share * 10_000) / 100 if covered.items else None
        metadata: dict[str, Any] = {**vars(covered), "coverage_percent": percent}
        if batches:
            rows = [dg.TableRecord(vars(batch)) for batch in batches]
            metadata["batches_not_covered"] = dg.MetadataValue.table(rows)
        return result(context, collection, "coverage", covered.complete and not failed, words, metadata, severity)

    @dg.asset_check(asset=table, name="integrity")
    def integrity_check(context: dg.AssetCheckExecutionContext, pipeline: PipelineResource) -> dg.AssetCheckResult:
        """Every vector can be right: the model's dimension, finite, of unit length, and not all the same. If it fails,
        run `embeddings-pipeline sync --force`.
        """
        with failures():
            collection = pipeline.open(definition)
            vectors = integrity(collection.database, collection.model)
        wrong = f"{vectors.wrong_dimension:,} of another dimension, {vectors.not_finite:,} not finite or zero"
        counts = f"{counted(vectors.vectors, 'vector')}: {wrong}, {vectors.not_unit:,} not of unit length"
        counts += ", all the same" if vectors.all_equal else ""
        return result(context, collection, "integrity", vectors.sound, counts, vars(vectors))

    @dg.asset_check(asset=table, name="quarantine")
    def quarantine_check(context: dg.AssetCheckExecutionContext, pipeline: PipelineResource) -> dg.AssetCheckResult:
        """No text and no whole item failed. It warns of one and names it; it is an error above 10 that are more than
        `quarantine.error_percent` of all texts, or if nothing else is there. If it fails, see
        `embeddings-pipeline quarantine list`.
        """
        with failures():
            collection = pipeline.open(definition)
            entries = [entry for entry in collection.ledger.quarantine_entries() if entry.items]
            vectors = coverage(collection.database, collection.model).vectors
        percent = 100 * len(entries) / (vectors + len(entries) or 1)
        given_up = sum(entry.next_try is None for entry in entries)
        most = definition.attributes.quarantine.error_percent
        too_many = percent > most and (len(entries) > FEW_IN_QUARANTINE or most == 0)
        error = too_many or (bool(entries) and not vectors)
        counts = f"{texts_and_items(len(entries))} ({percent:.2f} %) in quarantine, {given_up:,} of them given up"
        named = [f"item {entry.item_key} at {entry.step}, {entry.reason}" for entry in entries[:NAMED_IN_QUARANTINE]]
        more = [f"and {len(entries) - len(named):,} more"] if len(entries) > len(named) else []
        counts += f": {'; '.join([*named, *more])}" if named else ""
        reasons = {f"reason_{n}": entry.reason for n, entry in enumerate(entries[:3], 1)}
        metadata = {"quarantined": len(entries), "given_up": given_up, "percent": round(percent, 4), **reasons}
        severity = dg.AssetCheckSeverity.ERROR if error else dg.AssetCheckSeverity.WARN
        return result(context, collection, "quarantine", not entries, counts, metadata, severity)

    @dg.asset_check(asset=table, name="truncation")
    def truncation_check(context: dg.AssetCheckExecutionContext, pipeline: PipelineResource) -> dg.AssetCheckResult:
        """No text is longer than the model reads: the end of one that is counts for nothing. It warns, with the share
        of such texts and the longest. If it fails, split long texts with `chunk:`.
        """
        with failures():
            collection = pipeline.open(definition)
            counted = truncation(collection)
        metadata = {
            "texts": counted.texts,
            "truncated": counted.truncated,
            "percent": round(100 * counted.share, 4),
            "longest_tokens": counted.longest,
        }
        warn = dg.AssetCheckSeverity.WARN
        return result(context, collection, "truncation", not counted.truncated, in_words(counted), metadata, warn)

    @dg.asset_check(asset=table, name="spend")
    def spend_check(context: dg.AssetCheckExecutionContext, pipeline: PipelineResource) -> dg.AssetCheckResult:
        """What the hosted model's answers have cost: `usd_today` (UTC), which the asset's plots have too, and a row a
        day. It warns if `budget:` is reached, or if no price is known. If it fails, raise the budget or wait, or give
        `price:` in the profile.
        """
        with failures():
            collection = pipeline.open(definition)
            spent = spend(collection.database, definition.name)
        budget = definition.attributes.budget
        limit = budget.usd_per_day if budget else None
        within = limit is None or spent.usd_today < limit
        days = [
            dg.TableRecord({**vars(day), "day": str(day.day), "models": ", ".join(day.models)}) for day in spent.days
        ]
        metadata = {
            "usd_today": round(spent.usd_today, 6),
            "usd_per_day": limit,
            f"usd_{DAYS}_days": round(spent.usd, 6),
            "days": dg.MetadataValue.table(days) if days else None,
        }
        # The UI plots numbers of an asset, and none of a check.
        seen = dg.AssetObservation(asset_key=table, metadata={"usd_today": metadata["usd_today"]})
        context.op_execution_context.log_event(seen)
        passed, warn = within and not spent.unpriced_models, dg.AssetCheckSeverity.WARN
        return result(context, collection, "spend", passed, spent.told(limit), metadata, warn)

    @dg.asset_check(asset=table, name="freshness")
    def freshness_check(context: dg.AssetCheckExecutionContext, pipeline: PipelineResource) -> dg.AssetCheckResult:
        """What was seen to have changed is committed within the hour, and the whole source was scanned within a day. If
        it fails, see whether the sensor and the daily refresh are on and why runs fail, or run
        `embeddings-pipeline sync`.
        """
        with failures():
            collection = pipeline.open(definition)
            waits = freshness(collection.database, definition.name, collection.model.destination)
        now = waits.asked_at
        waiting = (now - waits.oldest_change).total_seconds() / 60 if waits.oldest_change else 0.0
        scanned = (now - waits.full_scan_at).total_seconds() / 3600 if waits.full_scan_at else math.inf
        fresh = waiting <= LATE_MINUTES and scanned <= SCAN_HOURS
        oldest = f"{waiting:.0f} minutes" if waits.oldest_change else "none"
        last = f"{scanned:.1f} hours ago" if waits.full_scan_at else "never"
        words = f"oldest change that is not committed: {oldest}; last full scan: {last}"
        metadata = {
            "oldest_change_minutes": round(waiting, 2),
            "hours_since_full_scan": round(scanned, 3) if waits.full_scan_at else None,
        }
        return result(context, collection, "freshness", fresh, words, metadata)

    @dg.asset_check(asset=asset_key(definition, "audit"), name="model_drift", pool=ENCODER_POOL)
    def drift_check(context: dg.AssetCheckExecutionContext, pipeline: PipelineResource) -> dg.AssetCheckResult:
        """The model gives the vectors that it gave when it was first used: twenty texts are encoded again, and their
        cosine is at least 0.999. If it fails, a library, the processor's path or the service has changed: go back, or
        run `embeddings-pipeline sync --force`.
        """
        with failures():
            collection = pipeline.open(definition)
            try:
                drift = measure(collection, collection.encoder())
            except ProfileError as error:  # its weights are no longer those of the fingerprint, or are gone
                return result(context, collection, "model_drift", False, str(error), {})
        words = f"{counted(drift.texts, 'text')}, lowest cosine {drift.lowest_cosine:.6f} (at least {LEAST_COSINE})"
        return result(context, collection, "model_drift", drift.same, words, vars(drift))

    @dg.asset_check(asset=index, name="index_parity")
    def parity_check(context: dg.AssetCheckExecutionContext, pipeline: PipelineResource) -> dg.AssetCheckResult:
        """The FAISS index holds exactly the table's vectors, and finds what an exact search in the table finds. An
        index that is behind the table passes: it is built again with the next sync, as is one that fails. If it fails,
        run `embeddings-pipeline sync`.
        """
        with failures():
            collection = pipeline.open(definition)
            faiss_index = open_index(collection.settings.state_dir / "faiss", definition.name)
            parity = check_parity(collection.database, collection.model.destination, faiss_index)
        if not parity.comparable:
            behind = "the index is behind the table; the next sync builds it again"
            return result(context, collection, "index_parity", True, behind, {"current": False})
        ids = f"{counted(parity.in_index, 'vector')}, {parity.missing_in_index:,} missing"
        ids += f", {parity.not_in_table:,} not in the table"
        searches = f"{parity.sampled - parity.differing:,} of {parity.sampled:,} searches as exact ones, recall@10 "
        searches += f"{parity.recall_at_10:.3f}, scores differ by up to {parity.score_error:.1g}"
        if not parity.ok:
            build_again(collection)
        metadata = {name: value for name, value in vars(parity).items() if name != "comparable"}
        return result(
            context, collection, "index_parity", parity.ok, f"{ids}; {searches}", {**metadata, "current": True}
        )

    return [
        coverage_check,
        integrity_check,
        quarantine_check,
        truncation_check,
        *([spend_check] if is_paid(profile) else []),
        freshness_check,
        drift_check,
        parity_check,
    ]
