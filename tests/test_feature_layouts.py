"""Stages of any layout: what pooling names mean, and what the loss finds out by running a model."""

import pytest
import torch
from torch import Tensor, nn

from gkd_fast import GraphKDLoss, StageFeatures
from gkd_fast.features import Pooling, pool_features

IMAGES = torch.randn(2, 3, 64, 64)


def _criterion(model: nn.Module, stages: list[str], sample=IMAGES, **options) -> GraphKDLoss:
    """Of a model with itself; the features of its stages are then taken, and have the widths that were found."""
    options = {"student_stages": stages, "teacher_stages": stages, "num_classes": 2, "embed_dim": 4} | options
    criterion = GraphKDLoss.from_models(model, model, sample, **options)
    select = options.get("select")
    collected = StageFeatures(model, stages, pool=criterion.student_pool, select=select)
    _, features = collected(**sample) if isinstance(sample, dict) else collected(sample)
    collected.remove()
    assert [x.shape[1] for x in features] == criterion.student_dims == criterion.teacher_dims
    batch = len(features[0])
    assert criterion(features, features, torch.arange(batch) % 2).isfinite()
    return criterion


class SequenceFirst(nn.Module):
    """A vision tower that runs [L, B, D] inside, as OpenAI's CLIP does."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).permute(2, 0, 1)
        return self.second(self.first(x)).mean(0)


class ChannelsLast(nn.Module):
    """Two stages [B, H, W, C], and [B, C, L] between them; ``size`` is the only one that it takes."""

    def __init__(self, size: int | None = None):
        super().__init__()
        self.size = size
        self.stem = nn.Conv2d(3, 6, 4, 4)
        self.maps, self.signal = nn.Linear(6, 6), nn.Conv1d(6, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert self.size in (None, x.shape[-1]), "another size"
        x = self.maps(self.stem(x).permute(0, 2, 3, 1))
        return self.signal(x.flatten(1, 2).transpose(1, 2)).mean(2)


class TwoOutputs(nn.Module):
    """Its stages return a tuple and a dict."""

    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), "more"

    class Named(nn.Linear):
        def forward(self, x):
            return {"hidden": super().forward(x)}

    def __init__(self):
        super().__init__()
        self.pair, self.named = self.Pair(5, 6), self.Named(6, 7)

    def forward(self, x):
        return self.named(self.pair(x)[0])["hidden"]


def test_torchvision_swin_convnext_and_vit():
    models = pytest.importorskip("torchvision.models")
    swin = _criterion(models.swin_t(), ["features.1", "features.3"])
    assert swin.student_dims == [96, 192] and swin.student_pool == ["mean_nhwc", "mean_nhwc"]
    convnext = _criterion(models.convnext_tiny(), ["features.1", "features.3"])
    assert convnext.student_dims == [96, 192] and convnext.student_pool == ["mean", "mean"]
    vit = models.VisionTransformer(64, 16, num_layers=2, num_heads=2, hidden_dim=20, mlp_dim=24)
    layers = ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"]
    assert _criterion(vit, layers).student_dims == [20, 20]
    assert _criterion(vit, layers, pool="cls").student_pool == ["cls", "cls"]


@pytest.mark.parametrize(
    ("name", "options", "stages", "dims"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)},
            ["layers.0", "layers.1"],
            [24, 48],
        ),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)}, ["stages.0", "stages.2"], [8, 16]),
        (
            "vit_tiny_patch16_224",
            {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2, "reg_tokens": 4},
            ["blocks.0", "blocks.1"],
            [24, 24],
        ),
    ],
)
def test_timm(name, options, stages, dims):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False, **options)
    assert _criterion(model, stages).student_dims == dims


def test_hidden_states_of_a_hugging_face_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20
    )
    model = transformers.BertModel(config)
    words = {"input_ids": torch.randint(50, (3, 12)), "attention_mask": torch.ones(3, 12, dtype=torch.long)}
    words["attention_mask"][1, 5:] = 0
    layers = ["encoder.layer.0", "encoder.layer.1"]
    criterion = _criterion(model, layers, words, select=0)
    assert criterion.student_dims == [16, 16] and criterion.student_pool == ["mean", "mean"]
    whole = _criterion(model, [""], words, select="last_hidden_state", pool=Pooling(mask="attention_mask"))
    assert whole.student_dims == [16]
    model.eval()
    hidden = model(**words).last_hidden_state
    _, (found,) = StageFeatures(model, [""], pool=Pooling(mask="attention_mask"), select="last_hidden_state")(**words)
    torch.testing.assert_close(found[1], hidden[1, :5].mean(0))
    torch.testing.assert_close(found[0], hidden[0].mean(0))


def test_sequence_first_stages_are_found_out_or_refused():
    model = SequenceFirst()
    criterion = _criterion(model, ["first", "second"])
    assert criterion.student_dims == [12, 12] and criterion.student_pool == ["mean_lnc"] * 2
    with pytest.raises(
        ValueError, match=r"stage 'first' must give one row per sample: 16 rows .*\(16, 2, 12\).*mean_lnc"
    ):
        StageFeatures(model, ["first"])(IMAGES)
    _, (found,) = StageFeatures(model, ["first"], pool="mean_lnc")(IMAGES)
    torch.testing.assert_close(found, model.first(model.patches(IMAGES).flatten(2).permute(0, 2, 1)).mean(1))
    with pytest.raises(ValueError, match=r"student stage 'first' .* pool='mean' .* pass pool='mean_lnc'"):
        _criterion(model, ["first"], pool="mean")


@pytest.mark.parametrize("size", [None, 64])
def test_channels_last_and_signals_are_found_out_or_asked_for(size):
    model = ChannelsLast(size)
    assert _criterion(model, ["maps"]).student_dims == [6]
    if size is None:
        criterion = _criterion(model, ["maps", "signal"])
        assert criterion.student_dims == [6, 10] and criterion.student_pool == ["mean_nhwc", "mean_ncl"]
        message = r"student stage 'maps' must give .* \(2, 16\) of \(2, 16, 16, 6\) and .* pass pool='mean_nhwc'"
        with pytest.raises(ValueError, match=message):
            _criterion(model, ["maps"], pool="mean")
        stages = StageFeatures(model, ["maps"])
        stages(IMAGES)
        with pytest.raises(ValueError, match="stage 'maps' must have one width: 16 before, 8 of .*'mean_nhwc'"):
            stages(IMAGES[:, :, :32, :32])
    assert _criterion(model, ["signal"], pool="mean_ncl").student_dims == [10]


def test_a_layout_that_cannot_be_told_asks_for_the_pooling():
    class Cube(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = nn.Identity()

        def forward(self, x):
            assert x.shape[-1] == 64
            return self.stage(x.flatten(1)[:, :512].view(-1, 8, 8, 8))

    with pytest.raises(
        ValueError, match=r"student stage 'stage' does not tell .* \(2, 8, 8, 8\); pass pool=, as 'mean'"
    ):
        _criterion(Cube(), ["stage"])
    assert _criterion(Cube(), ["stage"], pool="mean").student_dims == [8]


def test_samples_that_were_folded_into_others_are_refused():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = nn.Identity()

        def forward(self, x):
            return self.stage(x.view(-1, 3, 32, 32)).view(len(x), -1)

    with pytest.raises(ValueError, match=r"one dimension for the samples, got shapes \(8, 3, 32, 32\) for 2 and \(4,"):
        _criterion(Folded(), ["stage"])


def test_entries_of_tuples_and_dicts_are_selected():
    model, rows = TwoOutputs(), torch.randn(3, 5)
    criterion = _criterion(model, ["pair", "named"], rows, select=[0, "hidden"])
    assert criterion.student_dims == [6, 7]
    _, (found,) = StageFeatures(model, ["named"], select=lambda output: output["hidden"])(rows)
    assert torch.equal(found, model(rows))
    with pytest.raises(TypeError, match="stage 'pair' must return a Tensor, got tuple; select= chooses"):
        StageFeatures(model, ["pair"])(rows)
    with pytest.raises(ValueError, match="stage 'pair': select=3 is not in it"):
        StageFeatures(TwoOutputs(), ["pair"], select=3)(rows)


def test_a_sample_may_be_a_dict_or_several_arguments():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = nn.Linear(4, 3)

        def forward(self, x, y):
            return self.stage(x + y)

    rows = torch.randn(5, 4)
    assert _criterion(Sum(), ["stage"], {"x": rows, "y": rows}).student_dims == [3]
    stages = {"student_stages": ["stage"], "teacher_stages": ["stage"], "num_classes": 2}
    assert GraphKDLoss.from_models(Sum(), Sum(), (rows, rows), **stages).student_dims == [3]


def test_the_loss_is_in_the_type_and_on_the_device_of_the_student():
    model, sample = nn.Linear(4, 3).double(), torch.randn(5, 4, dtype=torch.float64)
    assert {p.dtype for p in _criterion(model, [""], sample).parameters()} == {torch.float64}
    options = {"student_stages": [""], "teacher_stages": [""], "num_classes": 2}
    on_meta = GraphKDLoss.from_models(model.to("meta"), model.to("meta"), sample.to("meta"), **options)
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("shape", "pool", "expected"),
    [
        ((2, 3, 4, 5), "mean", lambda x: x.mean((2, 3))),
        ((2, 3, 4, 5, 6), "mean", lambda x: x.mean((2, 3, 4))),
        ((2, 4, 3), "mean", lambda x: x.mean(1)),
        ((2, 3), "mean_nhwc", lambda x: x),
        ((2, 4, 5, 3), "mean_nhwc", lambda x: x.mean((1, 2))),
        ((2, 4, 5, 6, 3), "mean_nthwc", lambda x: x.mean((1, 2, 3))),
        ((2, 3, 4), "mean_ncl", lambda x: x.mean(2)),
        ((4, 2, 3), "mean_lnc", lambda x: x.mean(0)),
        ((2, 4, 3), "cls", lambda x: x[:, 0]),
        ((2, 4, 3), "mean_patches", lambda x: x[:, 1:].mean(1)),
        ((2, 9, 3), Pooling(prefix=5), lambda x: x[:, 5:].mean(1)),
        ((9, 2, 3), Pooling("lnc", prefix=5), lambda x: x[5:].mean(0)),
        ((9, 2, 3), Pooling("lnc", token=0), lambda x: x[0]),
    ],
)
def test_names_of_layouts(shape, pool, expected):
    x = torch.randn(shape)
    torch.testing.assert_close(pool_features(x, pool), expected(x))


def test_a_padding_mask_leaves_out_what_does_not_count():
    x, mask = torch.randn(2, 6, 3), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    x[0, 4:], x[1, 1:] = float("nan"), float("inf")
    found = pool_features(x, Pooling(prefix=1, mask="attention_mask"), mask)
    torch.testing.assert_close(found, torch.stack([x[0, 1:4].mean(0), torch.zeros(3)]))
    with pytest.raises(ValueError, match="attention_mask"):
        StageFeatures(nn.Linear(3, 3), [""], pool=Pooling(mask="attention_mask"))(torch.ones(2, 6, 3))


def test_poolings_of_sides_and_stages():
    pool = {"student": ["mean", "mean_nhwc"], "teacher": "cls"}
    criterion = GraphKDLoss([6, 8], 5, num_classes=2, pool=pool, backend="reference")
    maps, last, tokens = torch.randn(4, 6, 2, 3), torch.randn(4, 2, 3, 8), torch.randn(4, 7, 5)
    target = torch.arange(4) % 2
    expected = criterion([maps.mean((2, 3)), last.mean((1, 2))], tokens[:, 0], target)
    torch.testing.assert_close(criterion([maps, last], tokens, target), expected)
    with pytest.raises(ValueError, match="pool must be one for all stages or a list of 2, got a list of 1"):
        GraphKDLoss([6, 8], [5, 5], num_classes=2, pool=["mean"])
    with pytest.raises(ValueError, match="pool must have the keys 'student' and 'teacher'"):
        GraphKDLoss(6, 5, num_classes=2, pool={"students": "mean"})
    with pytest.raises(TypeError, match="pool must be .* got 3"):
        GraphKDLoss(6, 5, num_classes=2, pool=3)


@pytest.mark.parametrize("layout", ["nh", "nnc", "NCHW", "n-c", ""])
def test_layouts_that_say_nothing(layout):
    with pytest.raises(ValueError, match="layout must hold n"):
        Pooling(layout)
    with pytest.raises(ValueError, match="pool must be"):
        pool_features(torch.ones(2, 3), f"mean_{layout}")


def test_replicas_are_refused():
    replicated = nn.DataParallel(nn.Linear(2, 2))
    replicated.device_ids = [0, 1]
    for model in (replicated, nn.Sequential(replicated)):
        with pytest.raises(ValueError, match="model must not run as replicas, got DataParallel on 2 devices"):
            StageFeatures(model, ["module" if model is not replicated else ""])


def test_collecting_breaks_no_compiled_graph():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(2), nn.Conv1d(4, 5, 1))
    stages = StageFeatures(network, ["0", "3", "2"], pool=["mean", "mean_ncl", lambda x: x[:, :, 0]])
    images = torch.randn(2, 3, 6, 6)

    def step(x):
        output, features = stages(x)
        return output.square().mean() + sum(f.square().mean() for f in features)

    expected = torch.autograd.grad(step(images), list(network.parameters()))
    torch._dynamo.reset()
    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(images), list(network.parameters()))
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e)
