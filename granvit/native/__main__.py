"""`python -m granvit.native`: compiles the kernels in place."""
import sys

from granvit.native import main

sys.exit(main())
