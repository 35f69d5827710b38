"""Sharing: what leaves the machine for other people's eyes.

``document`` holds the plain parts a report is made of (headline, table, pictures, gallery, ...), ``report``
turns a ``ReportDocument`` into one self-contained HTML file and composes the report of a run, ``study`` that
of a study, from the ``facts`` they are given; ``numbers``, ``cases`` and ``evidence`` build their chapters;
``identities`` replaces ids by numbers before anything is built. Templates and styles lie in ``templates``;
``inspection`` draws what is in a pack; ``bundles`` exports a model for other programs (``host_network`` is
what they run) with its model card from ``cards``. May use everything above it: figures, imaging and
statistics most of all.

To add a chapter, write a function ``describe_<what>(facts) -> Section`` and name it in ``report_of_run``.
"""
