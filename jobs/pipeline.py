"""The whole chain as a Ray job; the same as `rc-ray run` on a machine of one's own.

    ray job submit --working-dir . -- python jobs/pipeline.py jobs/demo.yaml --force

Paths in the experiment file must be reachable from every node; so must `output_dir`.
"""

from __future__ import annotations

import sys

from rc_ray.cli import app

if __name__ == "__main__":
    app(["run", *sys.argv[1:]])
