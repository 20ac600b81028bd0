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
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.config.weights import resolve_weights, weights_bytes, weights_digest
from embeddings_pipeline.encoders.batches import OUT_OF_MEMORY, first_line
from embeddings_pipeline.encoders.converted_files import (
    FORMAT,
    read_manifest,
    read_sealed,
    workshop,
    write_manifest,
    write_sealed,
)
from embeddings_pipeline.encoders.openvino import OpenVinoEncoder, Readiness
from embeddings_pipeline.encoders.processor import kind_of_processor, memory_left, share_of_cores
from embeddings_pipeline.errors import OutageError, PipelineError, ProfileError

log = logging.getLogger(__name__)

NO_ROOM = "No space left"  # as the system says that a disk is full
UNEXPECTED_SECONDS = 24 * 3600  # after which a conversion that ended unexpectedly is tried again
ATTEMPTS = 3  # at a model whose files change meanwhile
LONGEST_SECONDS = 1800
CRASHES = {signal.SIGILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE}  # as on a processor that lacks something
CONVERSION_MEMORY, TORCH_MEMORY = (300_000_000, 2), (280_000_000, 1)
"""What a conversion takes at least, and torch in a process that has not imported it: bytes, and times the weights.
MiniLM's of 91 MB took 515 MB to convert, and torch more than the 353 MB that a `sync` had left.
"""
LIBRARIES = ("sentence-transformers", "torch", "transformers")  # another version of one may convert what failed


@dataclass(frozen=True)
class Verdict:
    """What came of a profile on a kind of processor."""

    precision: str | None  # of matrix products, `bf16` or `f32`; None: torch runs the model
    reason: str | None = None  # why torch does
    cosine: float | None = None  # the lowest to sentence-transformers' own vectors
    files: Mapping[str, str] | None = None  # digests of the files that were compared
    libraries: Mapping[str, str] | None = None
    unexpected: bool = False  # the conversion ended without an answer, which may have been this machine's fault


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
    torch cannot run, or if the model's files do not stay as they are meanwhile; OutageError if there is not the memory
    to make it ready, nor for torch.
    """
    for _ in range(ATTEMPTS):
        try:
            weights = weights_digest(resolve_weights(profile), state_dir=settings.state_dir)
            conversion = _Conversion(profile, settings, weights, kind)
            encoder = conversion.encoder()
        except (FilesChanged, FileNotFoundError):
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
        parts = [FORMAT, version("openvino"), version("tokenizers"), kind_of_processor(), self._place.name]
        parts += [profile.document_prompt, profile.query_prompt, profile.max_length, profile.normalize]
        parts += [profile.dimensions, profile.trust_remote_code]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()

    def encoder(self) -> OpenVinoEncoder | None:
        manifest = read_manifest(self._place)
        verdict = self._known_verdict(manifest)
        if verdict is None:
            with self._alone():
                manifest = read_manifest(self._place)  # another process may have made it meanwhile
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
        except PipelineError:
            raise
        except Exception as error:  # the tokenizer's errors have no other class
            self._keep_verdict(Verdict(None, f"it cannot be loaded: {first_line(error)}"), lasting=False)
            return None

    def _known_verdict(self, manifest: Mapping[str, Any] | None) -> Verdict | None:
        try:
            verdict = Verdict(**read_sealed(self._verdict))
            age = time.time() - self._verdict.stat().st_mtime
        except (OSError, ValueError, TypeError):
            return None
        if verdict.precision is None:
            is_old = not 0 <= age < UNEXPECTED_SECONDS  # a time that is yet to come counts as none
            if verdict.libraries != _libraries() or (verdict.unexpected and is_old):
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
        left = memory_left()
        if left is not None and left < self._takes(CONVERSION_MEMORY):
            self._check_memory()
            self._keep_verdict(Verdict(None, "there is too little memory left to convert it"), lasting=False)
            return None
        log.warning(
            "profile %s: %s, which takes some seconds, once",
            profile.name,
            f"{profile.model} is converted for OpenVINO"
            if manifest is None
            else "its model is tried on this processor",
        )
        with workshop() as temporary:
            new = temporary / "model"
            new.mkdir()
            answer = self._asked(
                {"converted": None if manifest is None else str(self._place), "new": str(new)}, temporary
            )
            if answer.get("changed"):
                raise FilesChanged
            verdict = Verdict(answer.get("precision"), answer.get("reason"), answer.get("cosine"))
            verdict = replace(verdict, unexpected=answer.get("unexpected", False))
            if verdict.precision is None:
                if answer.get("out_of_memory"):
                    self._check_memory()
                self._keep_verdict(verdict, lasting=answer.get("lasting", False))
                return None
            folder = self._place
            if manifest is None:
                folder = new
                manifest = write_manifest(new, self._weights, answer["readiness"])
                self._publish(new)
            self._keep_verdict(replace(verdict, files=manifest["files"]))
            return self._encoder(verdict, folder, manifest)

    def _takes(self, memory: tuple[int, int]) -> int:
        base, times = memory
        return base + times * weights_bytes(resolve_weights(self._profile))

    def _check_memory(self) -> None:
        """OutageError if torch has no room here either: beyond its limit a container ends, and nobody says why."""
        left = memory_left()
        if left is None or left >= self._takes(TORCH_MEMORY):
            return
        takes, left = (round(each / 1_000_000) for each in (self._takes(CONVERSION_MEMORY), max(0, left)))
        raise OutageError(
            f"Profile {self._profile.name}: to make {self._profile.model} ready takes about {takes:,} MB of memory, "
            f"once, and {left:,} MB are left: raise the limit for that time, or do it elsewhere, and bring "
            f"{self._kept} here"
        )

    def _asked(self, task: Mapping[str, Any], temporary: Path) -> dict[str, Any]:
        """What the process of its own says. If it was killed, or memory ran out, the next one is to try again."""
        profile = replace(self._profile, model=str(resolve_weights(self._profile)), device="cpu")
        answer = temporary / "answer.json"
        task = {**task, "profile": asdict(profile), "weights": self._weights, "threads": self._threads}
        (temporary / "task.json").write_text(json.dumps({**task, "answer": str(answer)}), "utf-8")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
        # -P: the folder in which somebody works, with modules of any name, is none to import from.
        command = [sys.executable, "-P", "-m", self._kind.converter, str(os.getpid()), f"{temporary}/task.json"]
        try:
            done = subprocess.run(
                command,
                check=False,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us, who end it
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
            [*_, said] = ["", *map(str.strip, done.stderr.strip().splitlines())]
            out_of_memory = -done.returncode == signal.SIGKILL or any(words in done.stderr for words in OUT_OF_MEMORY)
            failed = (done.returncode > 0 and NO_ROOM not in said) or -done.returncode in CRASHES
            return {
                "reason": f"its conversion ended with {end} {said}".strip(),
                "lasting": failed and not out_of_memory,
                "out_of_memory": out_of_memory,
                "unexpected": True,
            }
        return answered

    def _publish(self, new: Path) -> None:
        """Put a converted model into its place, whole. If that cannot be written, this process has it all the same."""
        beside = self._place.with_name(f"{self._place.name}.new")
        try:
            for left_over in (beside, self._place):
                shutil.rmtree(left_over, ignore_errors=True)
            beside.mkdir()
            for file in new.iterdir():
                shutil.copyfile(file, beside / file.name)
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
            write_sealed(beside, asdict(verdict))
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
