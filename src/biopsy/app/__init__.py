"""Programs that people and other programs talk to over HTTP: the viewer (`view`) and the service (`serve`).

`web` holds what both share (limits, refusals, the server), `scenes` what can be looked at, `viewer` the
page's addresses, `annotations` what reviewers say, `service` the REST interface, `jobs` and `batching` its
work.
"""
