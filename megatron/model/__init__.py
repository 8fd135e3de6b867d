"""The transformer. It knows no objective, only which keys a query may attend to (``mask.py``).

``batch.py``, ``mask.py``, ``loss.py`` and ``arithmetic.py`` import no torch, so that objectives need none.
"""
