"""The DAG file: a DAG for each plan in the folder that STEPWELL_PLANS names. docs/operations.md says how it is used."""

import os

from airflow_dags.factory import dags

globals().update(dags(os.environ["STEPWELL_PLANS"]))
