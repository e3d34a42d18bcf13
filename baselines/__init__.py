"""The methods that V-JEPA is compared with, a file each, in V-JEPA's own training loop.

    python -m baselines.videomae --preset tiny      every flag of train.py works here too

file              sees                            predicts                         loss
masks             clips, other masks              features of the target encoder   L1
no_stop_gradient  clips, multi-block masks        features of the encoder itself   L1
ijepa             frames, 4 blocks masked         features of the target encoder   L2
mae               frames, 25 % at random          normalized pixels                L2
videomae          clips, 10 % in tubes            normalized pixels                L2
videomae2         the same                        half of the same                 L2
dino              crops of a frame                the teacher's prototypes         cross-entropy

Each file has a Config, with train.Config's flags and its own, and `build(config)`, which returns
the model and one mask sampler per mask set. A model is a module with `forward(clips, masks) ->
loss`; `encoder` and `predictor`, which are trained; `update_target(momentum)`, called after every
optimizer step; and `probed_network`, the name of the network that is evaluated. Models with
`targets(clips)` and `loss_fn` get the metric relative_loss. A mask sampler has `num_context`,
`num_targets` and `sample(sample_ids, seed)`; `shapes_vary = True` if masks differ in size.
"""

import runtime  # noqa: F401 (before torch)
