"""`python -m mergekit_dam` is `mergekit-dam`."""

from mergekit_dam.launcher import end_with_launcher

end_with_launcher()  # at once: it may be killed in the seconds that the next line takes

from mergekit_dam.cli import main  # noqa: E402

main()
