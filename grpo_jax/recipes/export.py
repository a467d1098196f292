"""Export: any model that can be read, and so what a run has trained, as a Hugging Face folder."""

import pathlib
import shutil

from grpo_jax.errors import InputError
from grpo_jax.models.huggingface import MOST_SHARD, write_folder
from grpo_jax.models.loading import load_model


def export(source: str, folder: str, dtype: str = "", most_shard: int = MOST_SHARD) -> str:
    """Writes `folder`, which is there whole or not at all, and returns a line that says what is in it.

    `source` is a model as `model.path` names it: a run (its newest checkpoint) or one checkpoint of it are models too.
    Adapters are merged. Raises InputError where `folder` holds something already.
    """
    path = pathlib.Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{folder}: is there already: name a new folder")
    model = load_model(source)
    making = path.with_name(f"{path.name}.making")
    shutil.rmtree(making, ignore_errors=True)  # a kill may have left half of one
    making.parent.mkdir(parents=True, exist_ok=True)
    write_folder(str(making), model.architecture, model.params, model.tokenizer, dtype, most_shard)
    if path.exists():
        path.rmdir()
    making.rename(path)
    return f"{folder}: {model.architecture.family} from {model.source}"
