"""Models made ready for OpenVINO: kept in the state folder, checked, made once by a process of its own.

    <state folder>/encoders/<digest of the weights>/    model.xml, model.bin, tokenizer.json, manifest.json
    <state folder>/encoders/verdicts/<…>.json           what a profile gives on a kind of processor, or why it is torch

What is here never changes but as a whole: a folder is filled elsewhere, copied beside its place, and renamed.
"""

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.weights import resolve_weights, weights_digest
from embeddings_pipeline.encoders.batches import first_line
from embeddings_pipeline.encoders.openvino import GRAPH, TOKENIZER, OpenVinoEncoder, Readiness
from embeddings_pipeline.encoders.processor import kind_of_processor, share_of_cores
from embeddings_pipeline.errors import ProfileError

log = logging.getLogger(__name__)

FORMAT = 1  # raised if what is made here changes
MANIFEST = "manifest.json"
ATTEMPTS = 3  # at a model whose files change meanwhile
LONGEST_SECONDS = 1800
CRASHES = {signal.SIGILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE}  # as on a processor that lacks something
LIBRARIES = ("sentence-transformers", "torch", "transformers")  # another version of one may convert what failed


@dataclass(frozen=True)
class Verdict:
    """What came of a profile on a kind of processor."""

    precision: str | None  # of matrix products, `bf16` or `f32`; None: torch runs the model
    reason: str | None = None  # why torch does
    cosine: float | None = None  # the lowest to sentence-transformers' own vectors
    files: Mapping[str, str] | None = None  # digests of the files that were compared
    libraries: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Kind:
    """What models are made ready, and by what."""

    converter: str  # the module whose process converts and compares
    place: str  # what the name of its folder ends with
    runner: type[OpenVinoEncoder]


ENCODERS = Kind("embeddings_pipeline.encoders.convert", "", OpenVinoEncoder)


class FilesChanged(Exception):
    """The model's files are not those that were to be converted."""


def openvino_encoder(profile: Profile, settings: Settings, kind: Kind = ENCODERS) -> OpenVinoEncoder | None:
    """The profile's encoder on this processor. None, and a line in the log, if torch is to run the model.

    The first time a process of its own converts the model, which takes some seconds, and compares its vectors with
    those of sentence-transformers. Raises ProfileError if the profile does not fit the model, if it wants weights that
    torch cannot run, or if the model's files do not stay as they are meanwhile.
    """
    for _ in range(ATTEMPTS):
        weights = weights_digest(resolve_weights(profile), state_dir=settings.state_dir)
        try:
            conversion = _Conversion(profile, settings, weights, kind)
            encoder = conversion.encoder()
        except FilesChanged:
            continue
        if encoder is None and profile.weights is not None:
            raise ProfileError(
                f"Profile {profile.name}: `weights: {profile.weights}` is for what OpenVINO can run, and "
                f"{profile.model} is not: {conversion.reason}; leave it out"
            )
        return encoder
    raise ProfileError(
        f"Profile {profile.name}: the files of {profile.model} change while they are read; try again when they are "
        "complete"
    )


class _Conversion:
    """One profile's model, in its place in the state folder."""

    def __init__(self, profile: Profile, settings: Settings, weights: str, kind: Kind) -> None:
        self._profile = profile
        self._kind = kind
        self._weights = weights
        self._threads = settings.embedding_threads or share_of_cores()
        self._kept = settings.state_dir / "encoders"
        self._told = False
        self.reason: str | None = None  # why OpenVINO does not run it
        attention = "-bidirectional" if profile.bidirectional else ""
        bits = f"-{profile.weights}" if profile.weights else ""
        self._place = self._kept / f"{weights}{attention}{bits}{kind.place}"
        self._verdict = self._kept / "verdicts" / f"{self._verdict_name()}.json"

    def _verdict_name(self) -> str:
        """A short hash of all that the comparison depends on, but for the converted files."""
        profile = self._profile
        parts = [FORMAT, version("openvino"), kind_of_processor(), self._place.name, profile.document_prompt]
        parts += [profile.query_prompt, profile.max_length, profile.normalize, profile.dimensions]
        parts += [profile.trust_remote_code]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()

    def encoder(self) -> OpenVinoEncoder | None:
        manifest = _manifest(self._place)
        verdict = self._known_verdict(manifest)
        if verdict is None:
            with self._alone():
                manifest = _manifest(self._place)  # another process may have made it meanwhile
                verdict = self._known_verdict(manifest)
                if verdict is None:
                    try:
                        return self._made(manifest)
                    except OSError as error:  # not even a temporary file can be written
                        self._keep_verdict(Verdict(None, f"it cannot be converted: {error}"), lasting=False)
                        return None
        return self._encoder(verdict, self._place, manifest)

    def _encoder(self, verdict: Verdict, folder: Path, manifest: Mapping[str, Any] | None) -> OpenVinoEncoder | None:
        if verdict.precision is None or manifest is None:
            return None
        ready = Readiness(**manifest["readiness"])
        try:
            return self._kind.runner(self._profile, folder, ready, verdict.precision, self._threads)
        except RuntimeError as error:
            self._keep_verdict(Verdict(None, f"it cannot be loaded: {first_line(error)}"), lasting=False)
            return None

    def _known_verdict(self, manifest: Mapping[str, Any] | None) -> Verdict | None:
        try:
            verdict = Verdict(**json.loads(self._verdict.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        if verdict.precision is None:
            if verdict.libraries != _libraries():
                return None
            self.reason = verdict.reason
            if self._profile.weights is None:
                log.info("profile %s runs on torch: %s", self._profile.name, verdict.reason)
            return verdict
        return verdict if manifest is not None and manifest["files"] == verdict.files else None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else makes this model ready meanwhile; nothing, if the state folder cannot be written."""
        lock = FileLock(f"{self._place}.lock")
        try:
            self._kept.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.warning("profile %s: another process converts its model; waiting", self._profile.name)
                lock.acquire()
        except OSError:
            yield
            return
        try:
            yield
        finally:
            lock.release()

    def _made(self, manifest: Mapping[str, Any] | None) -> OpenVinoEncoder | None:
        """Have another process convert and compare, and keep what it made."""
        profile = self._profile
        if profile.trust_remote_code:
            self._keep_verdict(Verdict(None, "trust_remote_code lets the model run code of its own"))
            return None
        log.warning(
            "profile %s: %s, which takes some seconds, once",
            profile.name,
            f"{profile.model} is converted for OpenVINO"
            if manifest is None
            else "its model is tried on this processor",
        )
        with tempfile.TemporaryDirectory(prefix="embeddings-encoder-") as temporary:
            new = Path(temporary) / "model"
            new.mkdir()
            answer = self._asked(
                {"converted": None if manifest is None else str(self._place), "new": str(new)}, temporary
            )
            if answer.get("changed"):
                raise FilesChanged
            verdict = Verdict(answer.get("precision"), answer.get("reason"), answer.get("cosine"))
            if verdict.precision is None:
                self._keep_verdict(verdict, lasting=answer.get("lasting", False))
                return None
            folder = self._place
            if manifest is None:
                folder = new
                manifest = _write_manifest(new, self._weights, answer["readiness"])
                self._publish(new)
            self._keep_verdict(replace(verdict, files=manifest["files"]))
            return self._encoder(verdict, folder, manifest)

    def _asked(self, task: Mapping[str, Any], temporary: str) -> dict[str, Any]:
        """What the process of its own says. If it was killed, or memory ran out, the next one is to try again."""
        profile = replace(self._profile, model=str(resolve_weights(self._profile)), device="cpu")
        answer = Path(temporary) / "answer.json"
        task = {**task, "profile": asdict(profile), "weights": self._weights, "threads": self._threads}
        (Path(temporary) / "task.json").write_text(json.dumps({**task, "answer": str(answer)}), "utf-8")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", self._kind.converter, f"{temporary}/task.json"]
        try:
            done = subprocess.run(
                command,
                check=False,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=LONGEST_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"reason": f"it could not be converted: {error}"}
        try:
            answered: dict[str, Any] = json.loads(answer.read_text("utf-8"))
        except (OSError, ValueError):
            end = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
            [*_, said] = ["", *done.stderr.strip().splitlines()]
            failed = done.returncode > 0 and not any(word in said for word in ("MemoryError", "bad_alloc", "No space"))
            lasting = failed or -done.returncode in CRASHES
            return {"reason": f"its conversion ended with {end} {said}".strip(), "lasting": lasting}
        return answered

    def _publish(self, new: Path) -> None:
        """Put a converted model into its place, whole. If that cannot be written, this process has it all the same."""
        beside = self._place.with_name(f"{self._place.name}.new")
        try:
            for left_over in (beside, self._place):
                shutil.rmtree(left_over, ignore_errors=True)
            shutil.copytree(new, beside)
            beside.rename(self._place)
        except OSError as error:
            shutil.rmtree(beside, ignore_errors=True)
            self._tell_unwritable(error)

    def _keep_verdict(self, verdict: Verdict, *, lasting: bool = True) -> None:
        if verdict.precision is None:
            self.reason = verdict.reason
            if self._profile.weights is None:
                log.warning("profile %s runs on torch, not on OpenVINO: %s", self._profile.name, verdict.reason)
            if not lasting:
                return
            verdict = replace(verdict, libraries=_libraries())
        beside = self._verdict.with_suffix(".new")
        try:
            self._verdict.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(asdict(verdict), indent=1), "utf-8")
            beside.replace(self._verdict)
        except OSError as error:
            self._tell_unwritable(error)

    def _tell_unwritable(self, error: OSError) -> None:
        if not self._told:
            log.warning("%s cannot be written (%s): each process converts the model anew", self._kept, error.strerror)
        self._told = True


def _libraries() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ""
    return versions


def _write_manifest(folder: Path, weights: str, readiness: Mapping[str, Any]) -> dict[str, Any]:
    manifest = {
        "format": FORMAT,
        "openvino": version("openvino"),
        "weights": weights,
        "readiness": readiness,
        "files": _digests(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
    return manifest


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a converted model; None if it is not there, damaged, or of another version."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        made_by = (manifest["format"], manifest["openvino"])
        whole = made_by == (FORMAT, version("openvino")) and manifest["files"] == _digests(folder)
        Readiness(**manifest["readiness"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return manifest if whole else None


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for name in (GRAPH, str(Path(GRAPH).with_suffix(".bin")), TOKENIZER):
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
