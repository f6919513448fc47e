"""Names as people have them, for the directories that jobs read and write."""

import posixpath

from captioner import storage
from captioner.artifacts.manifests import Manifest, ModelManifest, open_manifest
from captioner.artifacts.output import Output
from captioner.artifacts.verify import verify

NAMES = (
    "José",
    "Jose\u0301",  # the same, as macOS spells it
    "写真",
    "two  blanks",
    " ends with blanks ",
    "a#b",
    "what?",
    "100%",
    "a%20b",
    "it's",
    'say "cheese"',
    "a&b;c|d$e`f",
    "*[x]{y}(z)!",
    "a=b,c+d~",
    "back\\slash",
    "a:b@c",
    "-dash",
    "line\nbreak",
)

# Most of them at once. A submitted job's arguments pass through a shell in double quotes, which keep all but these.
NAME = " ".join(name for name in NAMES if not set(name) & set('"$`\\\n'))


def check(uri: str) -> None:
    """Publish a directory with a file of the same name at ``uri``, and find it again by every road."""
    name = posixpath.basename(storage.absolute(uri))
    output = Output(uri, {"job": "any"})
    with output:
        output.publish(ModelManifest(files=[output.write(name, b"data")]))
    assert Output(uri, {"job": "any"}).complete
    assert [entry.path for entry in open_manifest(uri, Manifest).files] == [name]
    assert verify(uri).problems == []
    found = {file.path: file.uri for file in storage.list_files(uri)}
    assert storage.read_bytes(found[name]) == b"data"
