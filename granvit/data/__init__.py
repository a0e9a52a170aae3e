"""Region data and conversations: records, stores, prompts, images, batches, the loader."""
from absl import logging

logging.set_verbosity(logging.ERROR)  # grain warns on every import that an optional profiler is absent
