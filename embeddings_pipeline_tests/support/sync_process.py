"""A `sync` of the workbench's collection in a process of its own, for tests that kill it or run two at once.

python -m embeddings_pipeline_tests.support.sync_process [seconds that each call of the encoder takes]
"""

import sys
from dataclasses import asdict

from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.orchestration.sync import sync
from embeddings_pipeline_tests.support.deterministic import DeterministicEncoder
from embeddings_pipeline_tests.support.workbench import definition

if __name__ == "__main__":
    DeterministicEncoder.seconds_per_call = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
    print(asdict(sync(definition(), load_settings())))
