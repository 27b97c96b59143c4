"""Proofs of branch and bound as files, and a checker of them that shares no code with what found them."""

from cure_plugin.proofs.file import Checked, check_proofs
from cure_plugin.proofs.writer import Question, write_proofs

__all__ = ["Checked", "Question", "check_proofs", "write_proofs"]
