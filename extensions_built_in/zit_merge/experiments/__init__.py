"""What was tried and did not beat the plain sum where it could be judged (docs/evidence.md), for those who try it again."""
