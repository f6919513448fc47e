"""Files behind URIs, and directories that a job publishes in one step."""

from captioner.storage.files import (
    S3_ADDRESS_VARIABLES,
    FileInfo,
    absolute,
    atomic_writer,
    copy_file,
    create_exclusively,
    exists,
    is_directory,
    is_local,
    join,
    list_files,
    open_input,
    read_bytes,
    read_json,
    resolve,
    write_bytes,
)
from captioner.storage.output import CLAIM, MANIFEST, Output, differences

__all__ = [
    "CLAIM",
    "MANIFEST",
    "S3_ADDRESS_VARIABLES",
    "FileInfo",
    "Output",
    "absolute",
    "atomic_writer",
    "copy_file",
    "create_exclusively",
    "differences",
    "exists",
    "is_directory",
    "is_local",
    "join",
    "list_files",
    "open_input",
    "read_bytes",
    "read_json",
    "resolve",
    "write_bytes",
]
