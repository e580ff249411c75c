"""How `lund_street` was made: hold images of a reconstruction back as queries.

    python examples/hold_back.py RECONSTRUCTION OUT KEPT,KEPT,… QUERY,QUERY,… METRES_PER_UNIT WIDTH

RECONSTRUCTION is what `python -m gnnet.scenes.reconstruct` writes. The queries' observations leave the map, and so do
points of which fewer than two are left. The queries' poses in the whole reconstruction become the truth.
"""

import sys
from pathlib import Path

import numpy as np
import pycolmap
from PIL import Image

source, output = Path(sys.argv[1]), Path(sys.argv[2])
mapped, held_back = (set(names.split(",")) for names in sys.argv[3:5])
units, width = float(sys.argv[5]), int(sys.argv[6])
whole, kept = pycolmap.Reconstruction(source / "sparse"), pycolmap.Reconstruction()
whole.transform(pycolmap.Sim3d(units, pycolmap.Rotation3d(), np.zeros(3)))
for folder in ("images", "queries", "sparse"):
    (output / folder).mkdir(parents=True, exist_ok=True)
factors = {}
for camera in whole.cameras.values():
    factors[camera.camera_id] = width / camera.width
    camera.rescale(width, round(camera.height * width / camera.width))
    kept.add_camera_with_trivial_rig(camera)
cameras, poses, tracks = [], [], {}
for image in sorted((i for i in whole.images.values() if i.has_pose), key=lambda image: image.name):
    if image.name not in mapped | held_back:
        continue
    query, pose, camera = image.name in held_back, image.cam_from_world(), image.camera
    with Image.open(source / "images" / image.name) as picture:
        small = picture.convert("RGB").resize((camera.width, camera.height), Image.Resampling.LANCZOS)
        small.save(output / ("queries" if query else "images") / image.name, quality=85)
    if query:
        parameters = " ".join(f"{value:.9g}" for value in camera.params)
        cameras.append(f"{image.name} {camera.model.name} {camera.width} {camera.height} {parameters}\n")
        x, y, z, w = pose.rotation.quat
        poses.append(f"{image.name} {' '.join(f'{value:.9g}' for value in (w, x, y, z, *pose.translation))}\n")
        continue
    observed = [p for p in image.points2D if p.has_point3D()]
    points = [pycolmap.Point2D(p.xy * factors[camera.camera_id]) for p in observed]
    new = pycolmap.Image(image.name, pycolmap.Point2DList(points), camera_id=camera.camera_id, image_id=image.image_id)
    kept.add_image_with_trivial_frame(new, pose)
    for index, point in enumerate(observed):
        tracks.setdefault(point.point3D_id, []).append(pycolmap.TrackElement(image.image_id, index))
for point_id, elements in tracks.items():
    if len(elements) >= 2:
        point = whole.points3D[point_id]
        kept.add_point3D(point.xyz, pycolmap.Track(elements), point.color)
kept.update_point_3d_errors()
kept.write(output / "sparse")
(output / "queries.txt").write_text("".join(cameras))
(output / "truth.txt").write_text("".join(poses))
print(kept.summary())
