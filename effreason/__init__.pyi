from effreason.evaluation.evaluate import evaluate_models as evaluate_models
from effreason.grading.grader import Grader as Grader
from effreason.grading.grader import Reference as Reference
from effreason.lm.hf.pretrained import load_weights as load_weights
from effreason.lm.hf.pretrained import open_pretrained as open_pretrained
from effreason.lm.score import score as score
from effreason.loop import train as train
from effreason.rl.advantages import group_std as group_std
from effreason.rl.advantages import kl_return_to_go as kl_return_to_go
from effreason.rl.advantages import leave_one_out as leave_one_out
from effreason.rl.rewards import length_rewards as length_rewards
from effreason.runtime.config import Config as Config
from effreason.runtime.files import read_json_lines as read_json_lines
from effreason.sampling.draws import SamplingParams as SamplingParams
from effreason.sampling.generate import generate as generate
from effreason.types import Response as Response

__version__: str
__all__: list[str]
