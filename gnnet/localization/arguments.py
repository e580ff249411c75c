"""What the caller of a localizer hands over: made usable, or refused with what would be."""

from __future__ import annotations

import torch
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose

_ROUNDING = 1e-3  # by which a floating image may leave 0 to 1


def rgb_image(image: object) -> Tensor:
    """An image as (3, H, W) uint8 RGB on the CPU; floating values from 0 to 1 become 0 to 255.

    Raises:
        ValueError: for any other image; the message says how to make it one.
    """
    if not isinstance(image, Tensor):
        raise ValueError(
            f"the image is a {type(image).__module__}.{type(image).__qualname__}; expected a tensor (3, H, W) RGB, as "
            "torch.from_numpy(array).permute(2, 0, 1) of an array (H, W, 3); of OpenCV's BGR, array[..., ::-1].copy()"
        )
    shape = tuple(image.shape)
    if len(shape) != 3 or shape[0] != 3 or 0 in shape:
        hints = {
            "image.permute(2, 0, 1)": len(shape) == 3 and shape[2] == 3,
            "image[0], one image a call": len(shape) == 4,
            "image[:3], without transparency": len(shape) == 3 and shape[0] == 4,
            "image.expand(3, -1, -1), of grey values": len(shape) == 2 or shape[:1] == (1,),
        }
        hint = next((f": {how}" for how, fits in hints.items() if fits), "")
        raise ValueError(f"the image has the shape {shape}; expected (3, H, W) RGB{hint}")
    image = image.detach().cpu()
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise ValueError(f"the image is of type {image.dtype}; expected uint8, or floating from 0 to 1")
    low, high = (value.item() for value in image.float().aminmax())
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise ValueError(
            f"the image is floating, from {low:g} to {high:g}; expected 0 to 1, or uint8 from 0 to 255: "
            "image.round().clamp(0, 255).to(torch.uint8)"
        )
    return (image.float() * 255).round().clamp(0, 255).to(torch.uint8)


def one_camera(camera: object) -> Camera:
    """A camera on the CPU in float64.

    Raises:
        ValueError: if it is none, several, or not finite.
    """
    if not isinstance(camera, Camera) or camera.shape != ():
        raise ValueError(
            f"the camera is {_what(camera)}; expected one Camera, as "
            "Camera.from_colmap(model, width, height, parameters, torch.float64)"
        )
    camera = camera.to("cpu").to(torch.float64)
    if not (camera.size.isfinite().all() and camera.parameters.isfinite().all()):
        raise ValueError(f"the camera is not finite: size {camera.size.tolist()}, {camera.parameters.tolist()}")
    return camera


def one_pose(pose: object, what: str) -> Pose:
    """A pose on the CPU in float64; `what` it is, for messages.

    Raises:
        ValueError: if it is none, several, or not finite.
    """
    if not isinstance(pose, Pose) or pose.shape != ():
        raise ValueError(
            f"the {what} pose is {_what(pose)}; expected one Pose cam_from_world, as Pose.from_matrix(tensor)"
        )
    pose = pose.to("cpu").to(torch.float64)
    if not (pose.rotation.isfinite().all() and pose.translation.isfinite().all()):
        raise ValueError(f"the {what} pose is not finite: {pose.rotation.tolist()}, {pose.translation.tolist()}")
    return pose


def _what(value: object) -> str:
    kind = type(value).__name__
    return f"a batch {tuple(value.shape)} of {kind}s" if isinstance(value, Camera | Pose) else f"a {kind}"
