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

__all__ = [
    "S3_ADDRESS_VARIABLES",
    "FileInfo",
    "absolute",
    "atomic_writer",
    "copy_file",
    "create_exclusively",
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
