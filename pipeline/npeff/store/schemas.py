"""The schemas of the tables ``<run>/tables/<name>.parquet``, and their versions.

The key-value metadata of a file contain the name and the schema version of the table. A file without these metadata has
version 1, which differs from version 2 only in larger row groups. In version 2, the controls of `verification` have the
random baseline. Earlier versions lack the columns of `_SINCE`.

A float is null if it is not known (yet), and NaN or infinite if the computation gave this value. The table `examples`
may have further columns with the metadata of the task.
"""

from __future__ import annotations

import itertools

import pyarrow as pa

_TYPES = {
    "int": pa.int64(),
    "float": pa.float64(),
    "str": pa.string(),
    "bool": pa.bool_(),
    "bytes": pa.binary(),
    "float32s": pa.list_(pa.float32()),
    "ints": pa.list_(pa.int64()),
}


def _schema(columns: str) -> pa.Schema:
    """Parse a schema "name:type ...". A type that ends in ? is nullable."""
    pairs = [column.split(":") for column in columns.split()]
    return pa.schema([pa.field(name, _TYPES[kind.rstrip("?")], nullable=kind.endswith("?")) for name, kind in pairs])


SCHEMAS: dict[str, pa.Schema] = {
    "examples": _schema(
        "example:int id:str label:int? prediction:int? correct:bool? split:str valid:bool fisher_norm:float "
        "fisher_rank:int kept_trace:float? loss:float? logits:float32s? image:bytes? text:str?"
    ),
    "classes": _schema("class:int name:str"),
    "parameters": _schema("parameter:str shape:str? size:int? taken:bool reason:str?"),
    "spectrum": _schema("index:int eigenvalue:float cumulative:float?"),
    "spectrum_statistics": _schema(
        "name:str parameter_group:str? labels:str n_examples:int value:float? low:float? high:float?"
    ),
    "components": _schema(
        "component:int n_active:int mass:float energy:float nearest_component:int? nearest_cosine:float? "
        "lift_cosine:float? cosine_own:float? stability:float?"
    ),
    "top_examples": _schema("component:int split:str rank:int example:int coefficient:float"),
    "coefficients": _schema("example:int component:int coefficient:float"),
    "history": _schema(
        "iteration:int loss:float objective:float explained:float mu:float accepted:bool n_dead:int seconds:float"
        " sent_bytes:int"
    ),
    "selection": _schema(
        "n_components:int recommended:bool explained_held_out:float n_come_back:float balance:float "
        "cosine_seeds:float? cosine_halves:float silhouette_mean:float? silhouette_min:float? "
        "explained:float explained_held_out_sd:float? n_fits:int"
    ),
    "selection_fits": _schema(
        "n_components:int seed:int part:str explained:float explained_held_out:float? n_iter:int stopped:str "
        "seconds:float"
    ),
    "layer_energy": _schema("component:int parameter:str energy:float"),
    "verification": _schema(
        "component:int examples:str sign:int informative:bool? target_kl:float? epsilon:float reached_target:bool "
        "n_top:int kl_top:float "
        "matched:bool? n_matched:int? n_by_trace:int? trace_ratio:float? kl_matched:float? kl_ratio_matched:float? "
        "kl_ratio_matched_low:float? kl_ratio_matched_high:float? above_controls:bool "
        "kl_ratio_trace:float? small_step_ratio:float? auc:float? changed_top:float? changed_matched:float? "
        "n_baseline:int kl_baseline:float? kl_ratio:float? kl_ratio_low:float? kl_ratio_high:float? "
        "fisher_norm_ratio:float? "
        "random_epsilon:float? random_kl_top:float? random_kl_baseline:float? random_kl_ratio:float? "
        "other_component:int? other_epsilon:float? other_kl_top:float? other_kl_baseline:float? other_kl_ratio:float? "
        "other_kl_ratio_checked:float? kl_correlation:float? "
        "accuracy_top_before:float? accuracy_top_after:float? "
        "accuracy_baseline_before:float? accuracy_baseline_after:float? examples_passed:int? "
        "flip_from:int? flip_to:int? flip_share:float? raised_class:int? raised:float? "
        "lowered_class:int? lowered:float?"
    ),
    "prediction_shifts": _schema(
        "component:int examples:str sign:int class:int name:str? p_before:float p_after:float share_before:float "
        "share_after:float"
    ),
    "example_shifts": _schema(
        "component:int examples:str sign:int rank:int example:int place:int class_before:int name_before:str? "
        "class_after:int name_after:str? p_before:float p_after:float p_new:float kl:float context:str?"
    ),
    "ablation": _schema(
        "component:int examples:str displacement:float n_top:int n_baseline:int "
        "kl_top:float kl_baseline:float kl_ratio:float kl_ratio_low:float kl_ratio_high:float above_controls:bool "
        "fisher_norm_ratio:float random_kl_top:float random_kl_baseline:float random_kl_ratio:float "
        "other_component:int? other_kl_top:float? other_kl_baseline:float? other_kl_ratio:float? "
        "accuracy_top_before:float? accuracy_top_after:float? "
        "accuracy_baseline_before:float? accuracy_baseline_after:float?"
    ),
    "joint_ablation": _schema(
        "component:int examples:str draw:int? adversarial:bool n_removed:int removed:ints displacement:float "
        "overlap:float kl_removed_top:float? kl_removed_matched:float? kl_top:float? kl_matched:float? "
        "kl_ratio_matched:float? kl_ratio_unablated:float? kl_ratio_predicted:float? still_there:bool? "
        "examples_passed:int"
    ),
    "position_shares": _schema("component:int example:int position:int start:int? stop:int? token:str? share:float"),
    "inputs": _schema(
        "example:int class:int? n_samples:int information:float? information_se:float? entropy:float? "
        "entropy_se:float? prediction_stable:float? shape:ints"
    ),
    "input_shares": _schema(
        "example:int position:int group:str? start:int? stop:int? token:str? share:float? information:float"
    ),
    "input_groups": _schema("example:int group:str information:float share:float?"),
    "faithfulness_scores": _schema("example:int method:str replacement:str metric:str score:float passes:int"),
    "faithfulness": _schema(
        "method:str replacement:str metric:str n_examples:int mean:float low:float high:float difference:float? "
        "difference_low:float? difference_high:float? knows_replacement:bool passes_per_example:float"
    ),
    "step": _schema("step:float kl:float loss:float gained:int broken:int accuracy_tuning:float chosen:bool"),
    "repair": _schema("component:int n_top:int n_wrong:int odds_ratio:float p_value:float q_value:float"),
    "repair_steps": _schema(
        "edit:int component:int? sign:int? step:float n_target:int mended_target:int gained:int broken:int "
        "accuracy_tuning:float chosen:bool"
    ),
    "paths": _schema(
        "path:int space:str component:int? from_example:int to_example:int? length:float? distance:float? "
        "efficiency:float? half_at:float? n_points:int tolerance_met:bool share:float? matching:float? "
        "largest_difference:float?"
    ),
    "scales": _schema("path:int space:str s:float fisher:float psi:float?"),
    "morphs": _schema("path:int by:str step:int s:float image:bytes"),
    "label_scores": _schema("component:int name:str? n_top:int n_others:int detection:float? intruder:float?"),
    "selectivity": _schema("moved:int component:int examples:str sign:int n_examples:int kl:float kl_checked:float?"),
}
"""Schemas by table name.

examples: one row per example. `split` is "fit" or "held_out"; `image` is a PNG; `fisher_norm` is ‖F_i‖_F; `fisher_rank`
    is the number of rows of the factor; `kept_trace` is the fraction of the trace of the labels' Fisher that these rows
    cover, null for sampled and empirical labels; `loss` is the mean of -log p(label), null without labels.
    `prediction`, `correct` and `logits` are null for sequences.
classes: the names of the model's classes.
parameters: the parameters of the model. `shape`, such as 384x384, and `size` are those of the `taken` parameters;
    `reason` is why a parameter is not taken.
spectrum: the eigenvalues of the mean Fisher F̄ of the valid examples, descending, with the share of the trace in the
    eigenvalues up to each one, null for a Fisher of zero.
spectrum_statistics: statistics of the eigenvalues (`npeff.fisher.spectrum`) of F̄ of `n_examples` examples: of all, of
    about a half and of about a quarter. `parameter_group` is null for all parameters; the traces of layers are from the
    mean diagonal. `cap` is the largest number of eigenvalues that can differ from 0, `labels` the kind of the labels.
    `low` and `high` are the ends of a 95% interval by a jackknife over eight groups of examples, null if it is not
    known.
components: `mass` Σ_i W_ij and `energy` Σ_i W_ij² over the fit examples; `nearest_*` by |cos| in the sketch, null for a
    single component; `lift_cosine` between the sketched direction and the component or, for whitened directions, the
    combination of components, and `cosine_own` between the direction and the component's own direction, both null
    before the lift; `stability`,
    the mean |cos| with the matching components of fits to two halves of the examples, null if not computed.
top_examples: `rank` from 0, per component and split.
coefficients: the non-zero W_ij, ordered by component, then in descending order.
history: one row per iteration of the solver. `mu` is the damping or, for diagonals, the extrapolation parameter;
    `objective` is the loss with the penalties; `sent_bytes` is the number of bytes that each worker sends to all other
    workers together in the iteration.
selection: one row per number of components tried. `explained_held_out` is measured on held-out examples, or for each
    half of the examples on the other half if there are no held-out examples; it is the mean over the fits, with its
    standard deviation. `cosine_seeds` and `cosine_halves` are the mean matched |cos| of fits to the same examples, and
    to two halves. `n_come_back` is the number of components with a match of at least 0.9, and `balance` is
    Σ (2 cos² − 1); each is the smaller of the means over pairs of seeds and over pairs of halves. The silhouettes are
    those of clusters of components.
selection_fits: one row per fit. `part` is the fitted part of the examples: "all", or the "first" or "second" half of
    the split of the seed.
layer_energy: fraction of the squared norm of a component's direction in each parameter; the fractions sum to 1.
verification: one row per (component, examples "fit" or "held_out", sign +1 or -1). `informative` is whether the sign
    lowers the confidence on the fitted top examples; `target_kl` is the KL divergence that the step should give the top
    examples, null for a step of fixed length. The matched baseline has `n_matched` distinct examples of the same
    predicted class and the nearest trace of the Fisher; `n_by_trace` top examples are matched by the trace alone;
    `trace_ratio` is the ratio of the mean traces; `matched` is whether the component counts in the headline.
    `kl_ratio_matched` is the KL ratio with this baseline, and `low` and `high` are the ends of a 95% interval;
    `above_controls` is whether it is above 1, `trace_ratio` and the ratios of the controls with 95% confidence. The
    controls (`npeff.verification.controls`) have the same top and baseline examples. `kl_ratio_trace` is the ratio with
    the baseline matched by the trace alone, `kl_ratio` that with `n_baseline` random examples. `small_step_ratio` is
    the ratio of the evidences ‖A ĝ‖². `auc` is that of the KL divergences; `changed` are the fractions of predictions
    whose class changes. `kl_correlation` is the rank correlation between coefficients and KL divergences over random
    examples. `other_kl_ratio_checked` is a measured value of a predicted one. `examples_passed` is the number of
    examples that were passed through the model for the row. `flip_share` is the fraction of the predictions on the top
    examples that change from class `flip_from` to `flip_to`, for the most frequent change; `raised_class` is the class
    whose mean probability on the top examples increases most, by `raised`, and `lowered_class` the one whose mean
    probability decreases most, by `lowered`. A column is null if its value does not exist or was not measured:
    accuracies without labels, ratios of a step that does not reach its target.
prediction_shifts: what the step of a row of `verification` does to the predictions on the top examples. One row per
    class, or per class of the ten that increase and the ten that decrease most: its mean probability `p`, and the
    fraction `share` of the predictions that are this class. `name` is the name of the class or the text of the token.
    Fractions are means over the examples of the mean over an example's predictions. No rows for a step that does not
    reach its target and makes predictions more certain.
example_shifts: one row per top example of such a step, `rank` from 0, for the prediction that changes most in KL
    divergence, number `place` of the example's predictions. `p_before` and `p_after` are the probabilities of
    `class_before`, `p_new` is that of `class_after` after the step; `kl` is the KL divergence of the whole example.
    `context` is the text around the prediction, such as the text up to a predicted token, with the token in brackets;
    null if the task has none.
selectivity: mean KL divergence on the first top examples of `component` for the verification step along the direction
    of `moved`; on held-out examples if there are any. `kl_checked` is a measured value of a predicted `kl`.
ablation: columns of `verification`, with random baseline examples also for the controls, for the step that removes the
    part of the parameters along a direction. The step has length `displacement`, and so have the steps of the controls.
    One row per (component, examples), if requested.
joint_ablation: the step of the verification for the informative sign, after the part of the parameters in the span of
    the directions of other components is removed. One row per component and random subset (`draw` from 0), and one for
    the adversarial subset (`draw` is null), if requested and predictable. `removed` are the components of the subset,
    `displacement` is the length of the removed part, and `overlap` that of the projection of the component's direction
    onto the span. `kl_removed` are the KL divergences of the removal itself; `kl` and `kl_ratio_matched` are those of
    the step after it, and `kl_ratio_unablated` is the ratio without a removal. `kl_ratio_predicted` is the ratio after
    the removal on fitted examples, predicted from the sketches. A value is null if the step does not reach its target,
    if logits after the removal are not finite, or if there is no matched baseline.
position_shares: the evidence ‖A_i ĝ_j‖² of a top example for a direction, split over the tokens of the example.
    `share` is a fraction of the evidence and may be negative; the rest to 1 belongs to layers without positions.
    `start` and `stop` are characters of the example's text, null for a token that is not in the text.
inputs: the functional Fisher information of an example in nats, ½ E[⟨Σ∇f, ∇f⟩ / f] for the probability f of `class`, or
    ½ E[tr(Σ F)] if `class` is null, with its standard error over `n_samples` draws of N(0, Σ). `entropy` is the
    functional entropy that it bounds, estimated from the same draws, and `prediction_stable` is the fraction of draws
    with the same prediction. `shape` is the shape of the positions, such as 8 and 8 for pixels. All are null for an
    example with logits or gradients that are not finite, and entropies are null for a single draw or several
    predictions.
input_shares: the information split over the positions of the example. `share` is the fraction of the sum over the
    positions, null if that sum is 0, and `position` is a number in row-major order. `token` is the token of a text or
    the name of the position; `start` and `stop` are characters of the example's text.
faithfulness_scores: how well an attribution names the inputs on which a prediction depends, for one example. `metric`
    is "deletion" (low is good), "insertion" or "information" (high is good), see `npeff.input_fisher.faithfulness`;
    `passes` is the number of forward and backward passes of the attribution. NaN for an example that is not finite.
faithfulness: means over `n_examples` examples, with the ends of a 95% bootstrap interval. `difference` is the score of
    the functional Fisher information minus that of the method, on the same examples. `knows_replacement` is whether
    the method is made from the values that the test puts in place of inputs.
input_groups: sums of `input_shares` over groups of positions, such as modalities, segments or columns.
step: one row per step size tried, on the labelled examples. `kl` is the mean KL divergence from the model of the run,
    `loss` the mean loss after the step, `gained` the increase of the number of right predictions.
repair: number of wrong predictions among each component's top examples, with a one-sided hypergeometric test and its
    Benjamini-Hochberg q-value; smallest p-value first.
repair_steps: one row per step tried. `mended_target` is the number of wrong top examples that the step corrects;
    `gained` is the number of right predictions gained in all; `broken` is the number of predictions that were right
    before any edit and are wrong after the step; `accuracy_tuning` is the accuracy on the tuning examples; `edit` is
    the number of steps taken before. For a step along several components, `component` and `sign` are null and `step` is
    the total length.
label_scores: scores of the names and of the components by an embedding model (`npeff.statistics.label_scores`), on
    `n_top` held-out top examples and `n_others` others. `name` is the name that was scored, null without one.
paths: one row per path and space: `model`, and one prediction to compare it with, `input` or `gaussian`. A path leads
    from an example to another or, if `to_example` is null, along a stimulus parameter. `length` is the Fisher-Rao
    length ∫ √I ds, and `distance` that of the ends, null if it is not known; `efficiency` is their ratio; `half_at` is
    the position where ψ = ½. They are null if the information is not finite somewhere, the last two also for a length
    of 0. `tolerance_met` is whether the length is at most the sum of chords times 1 + tolerance. `share` is the
    fraction of the length in the direction in which `component` changes the predictions, null without a component.
    `matching` is the area matching score of a prediction, `largest_difference` the largest distance between its scale
    and that of the model; both are null for the model.
scales: the information and the scale ψ at positions s from 0 to 1 of a path. `psi` is null if the path has no scale.
morphs: images on the first paths between images, at equal steps of ψ (`by` is "psi") and of s (`by` is "s").
"""

_SINCE: dict[int, dict[str, tuple[str, ...]]] = {
    3: {
        "verification": (
            *("informative", "target_kl", "matched", "n_matched", "n_by_trace", "trace_ratio", "kl_matched"),
            *("kl_ratio_matched", "kl_ratio_matched_low", "kl_ratio_matched_high", "kl_ratio_trace"),
            *("small_step_ratio", "auc", "changed_top", "changed_matched", "other_kl_ratio_checked"),
            "examples_passed",
        ),
        "selectivity": ("kl_checked",),
        "components": ("cosine_own",),
    },
    4: {
        "verification": (
            *("flip_from", "flip_to", "flip_share", "raised_class", "raised", "lowered_class", "lowered"),
        ),
    },
    5: {"example_shifts": ("context",)},
}
"""Nullable columns that versions of a table before this one do not have."""

TABLES_VERSION = 5


def columns_since(name: str, version: int) -> tuple[str, ...]:
    """Return the columns that table `name` has in later versions than this one."""
    added = (tables.get(name, ()) for since, tables in _SINCE.items() if since > version)
    return tuple(itertools.chain.from_iterable(added))
