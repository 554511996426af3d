"""`python -m scripts.bfcl_model`: what `trainer` needs to run configs/bfcl_smollm2_sgcd.yaml."""

import os
import sys

from scripts.bfcl_model.prepare import main

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.exit(main())
