"""Named in a project's `imports`: its ranks call the roll in half the time."""

from lavis_lite.common import meeting

meeting.ROLL_CALL_SECONDS = 1.5
