"""Flickr8k and Flickr30k from the Hugging Face hub: fetched once into its cache, then read as Parquet files."""

import logging

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from captioner.config import SourceConfig
from captioner.errors import SourceError
from captioner.sources.parquet import ParquetSource

logger = logging.getLogger(__name__)

REPOSITORIES = {"flickr8k": "jxie/flickr8k"}


def open_hub(name: str, options: SourceConfig) -> ParquetSource:
    """The data set's Parquet files, from the hub's cache or, the first time, from the hub.

    Raises:
        SourceError: they are not in the cache and the hub cannot be reached.
    """
    if name not in REPOSITORIES:
        raise SourceError(f"{name}: not yet read from the hub; give a folder of its images or Parquet files")
    repository = REPOSITORIES[name]
    try:
        folder = snapshot_download(repository, repo_type="dataset", allow_patterns=["*.parquet"])
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise SourceError(
            f"{name}: {repository} is neither in the hub's cache nor reachable ({type(error).__name__}); on a machine "
            f"with a network run 'hf download --repo-type dataset {repository}', or give the folder of its Parquet files"
        ) from error
    return ParquetSource(folder, options, name=name)
