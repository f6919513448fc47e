"""The caption service on Ray Serve: one HTTP deployment in front of one deployment per model.

``build.build_app`` makes the application. Nothing is imported here, so that proxies and the HTTP deployment start
without the tensor library.
"""
