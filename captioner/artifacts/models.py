"""Whatever captions: a model directory, or a model of ``transformers``."""

from captioner import storage
from captioner.artifacts import model_hub
from captioner.artifacts.manifests import MANIFEST
from captioner.artifacts.model_directory import ModelDirectory, open_model
from captioner.artifacts.transformers_folder import TransformersFolder, is_transformers, open_folder

Model = ModelDirectory | TransformersFolder


def open_any(uri: str) -> Model:
    """A model's description, without its weights.

    Args:
        uri: of a model directory, a local folder of a captioning model of ``transformers``, or
            ``hf:org/name[@revision]`` of either.

    Raises:
        ModelError: it is neither, or one that cannot be used.
        OutOfReachError: the hub cannot be reached.
    """
    if uri.startswith(model_hub.PREFIX):
        foreign = model_hub.find_foreign(uri)
        return open_model(uri) if foreign is None else open_folder(foreign)
    root = storage.absolute(uri)
    own = storage.exists(storage.join(root, MANIFEST)) or not is_transformers(root)
    return open_model(uri) if own else open_folder(root)
