"""File formats of preference, instruction and prompt data, each in a module of its own.

`protocol` says what a format is, `exact` turns its rows into ours and back without loss, and `data_builders.convert`
lists the formats. What several of them share: `tags` (`<image>` in texts), `names` (images under one root), `files`
and `arrays` (JSON read and written without holding it), `sets` (InternVL's `meta.json`).
"""
