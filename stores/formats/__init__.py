"""How one unit lies on disk: one strategy object for each form of the store, behind one interface (`base.py`)."""
