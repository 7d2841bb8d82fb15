"""python -m extensions_built_in.zit_merge"""

import sys

from .cli.main import main

sys.exit(main())
