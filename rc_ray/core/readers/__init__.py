"""Readers of the raw formats in which publishers hand out interaction logs.

A reader streams one file: `text` (bytes to whole lines), `json_lines`, `delimited` or `columnar`
(lines to Arrow arrays), `conform` (arrays to the project's own columns). `formats` knows which
publisher names which file and column how; `shard` reads one file from end to end.
"""
