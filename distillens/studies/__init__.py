"""The main job: distil, evaluate, ask the three questions, write the report."""

from distillens.studies.asked import Study as Study
from distillens.studies.asked import design as design
from distillens.studies.outlook import Forecast as Forecast
from distillens.studies.outlook import forecast as forecast
from distillens.studies.work import study as study
