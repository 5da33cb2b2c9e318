"""Trees: one tensor or several by name, treated alike."""

import pytest
import torch

from dit_fast.errors import UserError
from dit_fast.tree import each, image, label, leaves, relabelled


def test_a_function_of_each_leaf():
    x, token = torch.ones(2, 3), torch.zeros(2)
    both = {"image": x, "class_token": token}
    assert torch.equal(each(torch.add, x, x), 2 * x)
    summed = each(torch.add, both, {"class_token": token + 1, "image": x})
    assert list(summed) == ["image", "class_token"]
    assert torch.equal(summed["class_token"], token + 1)
    assert leaves(both) is both
    assert leaves(x)["image"] is image(x) is image(both) is x


def test_trees_of_other_leaves_are_named():
    x = torch.ones(1)
    with pytest.raises(UserError, match="image, class_token and image"):
        each(torch.add, {"image": x, "class_token": x}, x)
    with pytest.raises(UserError, match="without an image: class_token"):
        image({"class_token": x})


def test_labels_alone_and_among_conditions():
    y, omega = torch.arange(3), torch.ones(3)
    assert label(y) is label({"omega": omega, "label": y}) is y
    assert relabelled(y, y + 1).tolist() == [1, 2, 3]
    told = relabelled({"label": y, "omega": omega}, y + 1)
    assert told["omega"] is omega
    assert told["label"].tolist() == [1, 2, 3]
    with pytest.raises(UserError, match="without a label: omega"):
        label({"omega": omega})
