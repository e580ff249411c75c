"""One reader a dataset layout: folders to a `Scene`.

Every reader takes `on_bad`, which is `raise` to end at the first broken file, line or image, or `skip` to leave it out
and keep a message (`Scene.problems`), and `progress`: show progress bars.
"""
