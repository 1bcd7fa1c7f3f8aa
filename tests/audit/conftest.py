"""What the tests of the audit share: the corpus of planted faults and healthy models, as the package `audit_corpus`.

The folder is called `corpus`, as that of diagnose; a name of its own keeps the two apart in one test run.
"""

import importlib.util
import sys
from pathlib import Path

_HOME = Path(__file__).parent / "corpus"

if "audit_corpus" not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        "audit_corpus", _HOME / "__init__.py", submodule_search_locations=[str(_HOME)]
    )
    sys.modules["audit_corpus"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["audit_corpus"])
