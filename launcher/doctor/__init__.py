"""What stands between a cluster and a job: findings, each with the command that repairs it.

`rules` judges API objects and knows no cluster; `launcher.backend.kubernetes_doctor` reads them.
"""

from launcher.doctor.finding import Finding, Level

__all__ = ["Finding", "Level"]
