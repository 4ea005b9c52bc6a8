"""A demonstration that trains, packs, loads and scores six real fine-tunes in under a minute on two cores.

    model      a small vision transformer
    digits     scikit-learn's handwritten digits, and six tasks made of them
    training   pretraining, fine-tuning and scoring
    run        the whole of it, and what it prints

Needs the extra ``demo`` (scikit-learn).
"""

from __future__ import annotations

from tallstore.demo.run import DemoReport, TaskScore, main, run_demo

__all__ = ["DemoReport", "TaskScore", "main", "run_demo"]
